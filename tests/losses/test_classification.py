"""Losses of classes by formulas that anyone can check by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tests.losses.formulas import mean

LOGITS = [[1.0, 2.0, 3.0], [2.0, 3.0, 1.0]]
"""Scores of two rows for three classes."""
TRUTH = np.array([2, 0])
EXP = math.exp(1) + math.exp(2) + math.exp(3)
FIRST, SECOND = math.log(EXP) - 3.0, math.log(EXP) - 2.0
"""Cross-entropy of each row."""


@pytest.mark.parametrize(
    ("options", "truth", "expected"),
    [
        ({}, TRUTH, (FIRST + SECOND) / 2),
        ({"class_weight": [3.0, 1.0, 0.5]}, TRUTH, (0.5 * FIRST + 3 * SECOND) / 3.5),
        ({}, np.array([2, -100]), FIRST),
        ({"ignore_index": 0}, TRUTH, FIRST),
        (
            {"label_smoothing": 0.3},
            TRUTH,
            (0.7 * FIRST + 0.7 * SECOND + 2 * 0.3 * (math.log(EXP) - 2.0)) / 2,
        ),
    ],
)
def test_cross_entropy_divides_by_the_weights_of_what_counts(
    options: dict[str, Any], truth: Any, expected: float
) -> None:
    assert mean("cross_entropy", LOGITS, truth, **options) == pytest.approx(expected)


def test_nll_reads_log_probabilities() -> None:
    log_probabilities = np.log([[0.2, 0.8], [0.6, 0.4]])
    expected = -(math.log(0.8) * 2 + math.log(0.6) * 1) / 3
    got = mean("nll", log_probabilities, np.array([1, 0]), class_weight=[1.0, 2.0])
    assert got == pytest.approx(expected)


@pytest.mark.parametrize("name", ["bce", "bce_with_logits"])
def test_bce_of_two_probabilities(name: str) -> None:
    given = [0.3, 0.9] if name == "bce" else [math.log(0.3 / 0.7), math.log(0.9 / 0.1)]
    assert mean(name, given, [0.0, 1.0]) == pytest.approx(-(math.log(0.7) + math.log(0.9)) / 2)


def test_bce_with_a_weight_of_the_positives_divides_by_the_elements() -> None:
    given = [math.log(0.3 / 0.7), math.log(0.9 / 0.1)]
    got = mean("bce_with_logits", given, [0.0, 1.0], pos_weight=4.0)
    assert got == pytest.approx(-(math.log(0.7) + 4 * math.log(0.9)) / 2)


def test_soft_margin_of_a_score_on_each_side() -> None:
    expected = (math.log1p(math.exp(-2.0)) + math.log1p(math.exp(0.5))) / 2
    assert mean("soft_margin", [2.0, 0.5], [1.0, -1.0]) == pytest.approx(expected)


def test_multi_margin_divides_by_the_classes_of_a_row() -> None:
    expected = ((0.0 + 0.0) / 3 + (2.0 + 0.0) / 3) / 2  # row 0: 3 is above 1 and 2 by 1 at least
    assert mean("multi_margin", LOGITS, TRUTH) == pytest.approx(expected)


def test_multilabel_soft_margin_is_the_mean_over_a_rows_classes() -> None:
    probabilities = np.array([[0.9, 0.2], [0.5, 0.7]])
    logits = np.log(probabilities / (1 - probabilities))
    rows = [-(math.log(0.9) + math.log(0.8)) / 2, -(math.log(0.5) + math.log(0.7)) / 2]
    got = mean("multilabel_soft_margin", logits, [[1.0, 0.0], [0.0, 1.0]])
    assert got == pytest.approx(np.mean(rows))


def test_multilabel_margin_compares_each_class_listed_with_each_other_one() -> None:
    scores = [[0.1, 0.2, 0.4, 0.8]]
    pairs = [1 - (0.8 - 0.2), 1 - (0.8 - 0.4), 1 - (0.1 - 0.2), 1 - (0.1 - 0.4)]
    got = mean("multilabel_margin", scores, np.array([[3, 0, -1, 1]]))
    assert got == pytest.approx(sum(pairs) / 4)


@pytest.mark.parametrize(("per", "divisor"), [("element", 4), ("batch", 2)])
def test_kl_div_divides_by_what_the_spec_says(per: str, divisor: int) -> None:
    predicted = np.array([[0.5, 0.5], [0.25, 0.75]])
    truth = np.array([[0.1, 0.9], [0.5, 0.5]])
    expected = float((truth * np.log(truth / predicted)).sum()) / divisor
    assert mean("kl_div", np.log(predicted), truth, per=per) == pytest.approx(expected)


def test_smoothed_answers_are_nearer_to_one_half() -> None:
    given = [math.log(0.3 / 0.7), math.log(0.9 / 0.1)]
    of_no = 0.9 * math.log(0.7) + 0.1 * math.log(0.3)
    of_yes = 0.9 * math.log(0.9) + 0.1 * math.log(0.1)
    got = mean("bce_with_logits", given, [0.0, 1.0], label_smoothing=0.2)
    assert got == pytest.approx(-(of_no + of_yes) / 2)
