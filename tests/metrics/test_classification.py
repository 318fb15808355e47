"""Metrics of classes against scikit-learn: in any parts, weighted or not, on classes nobody has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as sk

from tests.metrics.parts import CUTS, value_of

RNG = np.random.default_rng(0)
N, C = 60, 7
TRUTH = RNG.integers(0, C - 1, N)  # nobody is of the last class
SCORES = RNG.random((N, C)) + 0.5 * np.eye(C)[TRUTH]
SHARES = SCORES / SCORES.sum(1, keepdims=True)
CHOSEN = SCORES.argmax(1)
YES = RNG.random(N) > 0.7
CHANCE = RNG.beta(2, 4, N).astype(np.float32)
CHANCE[:3] = [0, 1, 1]  # as a saturated sigmoid gives
WEIGHT = RNG.random(N)
WEIGHT[5:9] = 0
CLASSES = np.arange(C)
ONES = np.ones(N)


def log_loss(truth: Any, chance: Any, weight: Any) -> float:
    """scikit-learn's, of probabilities that float32 tells from certain."""
    least = np.finfo(chance.dtype).eps
    clipped = np.clip(chance.astype(np.float64), least, 1 - least)
    return float(sk.log_loss(truth, clipped, sample_weight=weight))


def calibration_error(came_true: Any, chance: Any, weight: Any) -> float:
    """The definition, bin by bin."""
    bins = np.minimum((chance.astype(np.float64) * 15).astype(int), 14)
    error = 0.0
    for one in range(15):
        w = weight * (bins == one)
        if w.sum():
            error += abs((w * chance).sum() - (w * came_true).sum())
    return error / float(weight.sum())


OF_CLASSES: dict[str, Callable[[Any], float]] = {
    "balanced_accuracy": lambda w: sk.balanced_accuracy_score(TRUTH, CHOSEN, sample_weight=w),
    "f1": lambda w: sk.f1_score(TRUTH, CHOSEN, average="macro", sample_weight=w, zero_division=0),
    "precision": lambda w: sk.precision_score(
        TRUTH, CHOSEN, average="macro", sample_weight=w, zero_division=0
    ),
    "recall": lambda w: sk.recall_score(
        TRUTH, CHOSEN, average="macro", sample_weight=w, zero_division=0
    ),
    "log_loss": lambda w: sk.log_loss(TRUTH, SHARES, sample_weight=w, labels=CLASSES),
    "perplexity": lambda w: np.exp(sk.log_loss(TRUTH, SHARES, sample_weight=w, labels=CLASSES)),
    "brier": lambda w: sk.brier_score_loss(TRUTH, SHARES, sample_weight=w, labels=CLASSES),
    "top_5_accuracy": lambda w: sk.top_k_accuracy_score(
        TRUTH, SHARES, k=5, sample_weight=w, labels=CLASSES
    ),
    "calibration_error": lambda w: calibration_error(CHOSEN == TRUTH, SHARES.max(1), w),
}
OF_TWO: dict[str, Callable[[Any], float]] = {
    "log_loss": lambda w: log_loss(YES, CHANCE, w),
    "brier": lambda w: sk.brier_score_loss(YES, CHANCE.astype(np.float64), sample_weight=w),
    "calibration_error": lambda w: calibration_error(YES, CHANCE, w),
}
SAID = CHANCE > 0.5
OF_LABELS: dict[str, Callable[[Any], float]] = {
    "accuracy": lambda w: sk.accuracy_score(YES, SAID, sample_weight=w),
    "balanced_accuracy": lambda w: sk.balanced_accuracy_score(YES, SAID, sample_weight=w),
    "f1": lambda w: sk.f1_score(YES, SAID, sample_weight=w),
    "precision": lambda w: sk.precision_score(YES, SAID, sample_weight=w),
    "recall": lambda w: sk.recall_score(YES, SAID, sample_weight=w),
}


@pytest.mark.parametrize("weight", [ONES, WEIGHT], ids=["plain", "weighted"])
@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize(
    ("prediction", "truth", "expected"),
    [(SHARES, TRUTH, OF_CLASSES), (CHANCE, YES, OF_TWO), (SAID, YES, OF_LABELS)],
    ids=["classes", "probabilities of yes", "labels"],
)
def test_it_is_scikit_learns(
    prediction: Any, truth: Any, expected: Any, cuts: list[int], weight: Any
) -> None:
    for name, score in expected.items():
        found = value_of(name, prediction, truth, weight, cuts)
        assert found == pytest.approx(score(weight), rel=1e-9), name


def test_of_many_classes_accuracy_takes_labels() -> None:
    for weight in (ONES, WEIGHT):
        found = value_of("accuracy", CHOSEN, TRUTH, weight, [4])
        assert found == pytest.approx(sk.accuracy_score(TRUTH, CHOSEN, sample_weight=weight))


def test_the_brier_score_of_two_classes_is_that_of_yes() -> None:
    both = np.stack([1 - CHANCE, CHANCE], 1).astype(np.float64)
    found = value_of("brier", both, YES.astype(int), WEIGHT, [])
    assert found == pytest.approx(value_of("brier", CHANCE, YES, WEIGHT, []), rel=1e-6)


def test_the_five_most_likely_of_equal_scores_are_scikit_learns() -> None:
    scores = RNG.integers(0, 3, (N, C)).astype(float)
    expected = sk.top_k_accuracy_score(TRUTH, scores, k=5, labels=CLASSES)
    assert value_of("top_5_accuracy", scores, TRUTH, ONES, []) == pytest.approx(expected)


@pytest.mark.parametrize("name", OF_CLASSES)
def test_no_items_have_no_value(name: str) -> None:
    none = value_of(name, SHARES[:0], TRUTH[:0], ONES[:0], [])
    assert np.isnan(none)
