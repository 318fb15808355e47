"""Areas under curves against scikit-learn: ties, weights, many labels, many classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn import metrics as sk

from pipeline.metrics import ranking
from tests.metrics.parts import value_of

RNG = np.random.default_rng(0)
N, K = 80, 4
WEIGHT = RNG.random(N)
WEIGHT[5:9] = 0
SCORES: dict[str, Any] = {
    "roc_auc": sk.roc_auc_score,
    "average_precision": sk.average_precision_score,
}
weights = pytest.mark.parametrize("weight", [np.ones(N), WEIGHT], ids=["plain", "weighted"])
names = pytest.mark.parametrize("name", SCORES)


@names
@weights
@pytest.mark.parametrize("decimals", [0, 1, 8])
def test_of_yes_and_no_with_any_ties(name: str, weight: Any, decimals: int) -> None:
    truth = RNG.random(N) < 0.3
    score = (RNG.normal(size=N) + truth).round(decimals).astype(np.float32)
    expected = SCORES[name](truth, score, sample_weight=weight)
    assert value_of(name, score, truth, weight, []) == pytest.approx(expected, rel=1e-9)


@names
@weights
def test_of_many_labels_it_is_their_mean(name: str, weight: Any) -> None:
    truth = RNG.random((N, K)) < 0.3
    score = RNG.normal(size=(N, K)) + truth
    expected = SCORES[name](truth, score, sample_weight=weight)
    each = np.repeat(weight[:, None], K, 1)
    assert value_of(name, score, truth, each, []) == pytest.approx(expected, rel=1e-9)


@names
@weights
def test_of_classes_it_is_the_mean_of_each_against_the_rest(name: str, weight: Any) -> None:
    truth = RNG.integers(0, K, N)
    shares = RNG.random((N, K)) + np.eye(K)[truth]
    shares /= shares.sum(1, keepdims=True)
    more = {"multi_class": "ovr"} if name == "roc_auc" else {}
    expected = SCORES[name](truth, shares, sample_weight=weight, **more)
    assert value_of(name, shares, truth, weight, []) == pytest.approx(expected, rel=1e-9)
    unseen = np.hstack([shares, np.zeros((N, 1))])  # a class that no row has
    assert value_of(name, unseen, truth, weight, []) == pytest.approx(expected, rel=1e-9)


@names
def test_one_class_alone_has_no_area(name: str) -> None:
    for truth in (np.zeros(N, bool), np.ones(N, bool)):
        assert np.isnan(value_of(name, RNG.random(N), truth, np.ones(N), []))


@names
def test_a_score_that_is_no_number_is_no_area(name: str) -> None:
    score = RNG.random(N)
    score[3] = np.nan
    assert np.isnan(value_of(name, score, RNG.random(N) < 0.5, np.ones(N), []))


def brute_concordance(risk: Any, time: Any, happened: Any, weight: Any) -> float:
    """Every pair, one after the other."""
    right = pairs = 0.0
    for i in range(len(risk)):
        for j in range(len(risk)):
            is_later = time[j] > time[i] or (time[j] == time[i] and not happened[j])
            if happened[i] and is_later:
                both = weight[i] * weight[j]
                pairs += both
                right += both * ((risk[i] > risk[j]) + 0.5 * (risk[i] == risk[j]))
    return right / pairs


@weights
@pytest.mark.parametrize("num_times", [1, 5, 1000])
def test_concordance_counts_every_pair_that_tells(
    num_times: int, weight: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranking, "MAX_PAIRED", 3)  # halves of halves
    time, happened = RNG.integers(0, num_times, N).astype(float), RNG.random(N) < 0.5
    risk = (RNG.normal(size=N) - time / num_times).round(1).astype(np.float32)
    truth = np.stack([time, happened], axis=1)
    wanted = brute_concordance(risk, time, happened, weight)
    assert value_of("concordance", risk, truth, weight, []) == pytest.approx(wanted, rel=1e-9)


def test_concordance_of_rows_that_tell_nothing_has_no_value() -> None:
    nothing = np.stack([np.arange(N), np.zeros(N)], axis=1)
    assert np.isnan(value_of("concordance", RNG.random(N), nothing, np.ones(N), []))
