"""Losses of classes by formulas that anyone can check by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from statsmodels.miscmodels.ordinal_model import OrderedModel

from pipeline import registry
from pipeline.losses.contract import build
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


@pytest.mark.parametrize("class_order", [None, [2, 0, 3, 1]])
def test_grades_are_statsmodels_proportional_odds(class_order: list[int] | None) -> None:
    """Of whole numbers in their order, or in another one."""
    rng = np.random.default_rng(0)
    grades = rng.integers(0, 4, 50)
    prediction = rng.normal(size=50)
    levels = np.array([-1.0, 0.3, 2.0])
    loss = build(registry.losses["ordinal"], {"class_order": class_order})
    assert loss.head is not None
    assert loss.link is not None
    head = loss.head(1, 4)
    steps = torch.from_numpy(np.log(np.expm1(np.diff(levels))))
    head.load_state_dict({"lowest": torch.tensor(levels[:1]), "steps": steps})
    head.double()
    ranks = grades if class_order is None else np.array(class_order)[grades]
    own = OrderedModel(ranks, prediction[:, None], distr="logit")
    wanted = own.loglikeobs(np.array([1.0, levels[0], *np.log(np.diff(levels))]))
    given = torch.from_numpy(prediction)
    items = loss.items(head, given, torch.from_numpy(grades)).detach().numpy()
    assert -items == pytest.approx(wanted, rel=1e-6)
    served = loss.link(head, given).detach().numpy()
    assert served.sum(1) == pytest.approx(np.ones(50))
    assert -np.log(served[np.arange(50), grades]) == pytest.approx(items)


def test_grades_begin_with_equal_shares() -> None:
    loss = build(registry.losses["ordinal"], {"class_order": None})
    assert loss.head is not None
    assert loss.link is not None
    served = loss.link(loss.head(1, 5), torch.zeros(1))
    assert served[0].tolist() == pytest.approx([0.2] * 5, rel=1e-5)


def test_a_teacher_whose_shares_are_met_leaves_nothing_to_learn() -> None:
    shares = np.array([[0.7, 0.2, 0.1], [1.0, 0.0, 0.0]])
    logits = np.log(np.maximum(shares, np.finfo(float).tiny))
    for temperature in (1.0, 4.0):
        found = mean("distillation", logits, shares, temperature=temperature)
        assert found == pytest.approx(0, abs=1e-7)
    cross = mean("cross_entropy", LOGITS, shares, soft_targets=True)
    entropy = -(shares[0] * np.log(shares[0])).sum() / 2
    assert mean("distillation", LOGITS, shares, temperature=1.0) == pytest.approx(cross - entropy)


def test_grades_whose_thresholds_meet_have_finite_losses() -> None:
    loss = build(registry.losses["ordinal"], {"class_order": None})
    assert loss.head is not None
    head = loss.head(1, 3)
    head.load_state_dict({"lowest": torch.zeros(1), "steps": torch.tensor([-200.0])})
    given = torch.zeros(3, requires_grad=True)
    items = loss.items(head, given, torch.tensor([0, 1, 2]))
    items.sum().backward()  # type: ignore[no-untyped-call]
    assert items.isfinite().all()
    assert given.grad is not None
    assert given.grad.isfinite().all()
