"""Metrics of amounts against scikit-learn: one column and several, weighted or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as sk

from tests.metrics.parts import CUTS, value_of

RNG = np.random.default_rng(0)
N = 50
WEIGHT = RNG.random(N)
WEIGHT[5:9] = 0
EVEN = np.repeat([1.0, 2.0], N // 2)
ONES = np.ones(N)

SCORES: dict[str, Callable[..., float]] = {
    "r2": sk.r2_score,
    "rmse": sk.root_mean_squared_error,
    "mae": sk.mean_absolute_error,
    "mape": sk.mean_absolute_percentage_error,
    "median_absolute_error": sk.median_absolute_error,
}


@pytest.mark.parametrize("weight", [None, WEIGHT, EVEN], ids=["plain", "weighted", "by twos"])
@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("num_columns", [1, 3])
@pytest.mark.parametrize("name", SCORES)
def test_it_is_scikit_learns(name: str, num_columns: int, cuts: list[int], weight: Any) -> None:
    truth, forecast = RNG.normal(150, 40, (2, N, num_columns))
    expected = SCORES[name](truth, forecast, sample_weight=weight)
    each = np.repeat((ONES if weight is None else weight)[:, None], num_columns, 1)
    assert value_of(name, forecast, truth, each, cuts) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("num", [1, 2, 5, 6])
def test_the_median_of_few(num: int) -> None:
    truth, forecast = RNG.normal(size=(2, num, 1))
    expected = sk.median_absolute_error(truth, forecast)
    found = value_of("median_absolute_error", forecast, truth, np.ones((num, 1)), [])
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("weight", [ONES, WEIGHT], ids=["plain", "weighted"])
def test_the_deviance_of_counts(weight: Any) -> None:
    truth, rate = RNG.poisson(2.0, N), RNG.gamma(2.0, size=N)
    assert (truth == 0).any()
    expected = sk.mean_poisson_deviance(truth, rate, sample_weight=weight)
    rates, counts, weights = (part[:, None] for part in (rate, truth.astype(float), weight))
    found = value_of("poisson_deviance", rates, counts, weights, [3, 20])
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("weight", [ONES, WEIGHT], ids=["plain", "weighted"])
def test_the_deviance_of_costs_and_claims(weight: Any) -> None:
    costs, means = RNG.gamma(2.0, size=(2, N))
    columns = [part[:, None] for part in (means, costs, weight)]
    expected = sk.mean_gamma_deviance(costs, means, sample_weight=weight)
    found = value_of("gamma_deviance", columns[0], columns[1], columns[2], [3, 20])
    assert found == pytest.approx(expected, rel=1e-9)
    claims = costs * (RNG.random(N) < 0.4)
    expected = sk.mean_tweedie_deviance(claims, means, sample_weight=weight, power=1.5)
    found = value_of("tweedie_deviance", columns[0], claims[:, None], columns[2], [3, 20])
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", SCORES)
def test_a_weight_of_nothing_has_no_value(name: str) -> None:
    truth, forecast = RNG.normal(size=(2, N, 1))
    assert np.isnan(value_of(name, forecast, truth, np.zeros((N, 1)), []))


def test_a_rate_that_underflows_costs_nothing_where_nothing_was_counted() -> None:
    rates, counts = np.array([[0.0], [1.0]]), np.array([[0.0], [1.0]])
    assert value_of("poisson_deviance", rates, counts, np.ones((2, 1)), []) == 0


@pytest.mark.parametrize("weight", [ONES, WEIGHT], ids=["plain", "weighted"])
@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_quantiles(cuts: list[int], weight: Any) -> None:
    truth, amounts = RNG.normal(size=N), np.sort(RNG.normal(size=(N, 3)), axis=1)
    levels = [0.1, 0.5, 0.8]
    served = np.stack([amounts, np.tile(levels, (N, 1))], axis=2)
    truths, weights = (np.repeat(values[:, None], 3, 1) for values in (truth, weight))
    wanted = np.mean([
        sk.mean_pinball_loss(truth, amounts[:, place], sample_weight=weight, alpha=level)
        for place, level in enumerate(levels)
    ])  # fmt: skip
    assert value_of("pinball_loss", served, truths, weights, cuts) == pytest.approx(
        wanted, rel=1e-9
    )
    is_in = (amounts[:, 0] <= truth) & (truth <= amounts[:, 2])
    wanted = np.average(is_in, weights=weight)
    assert value_of("coverage", served, truths, weights, cuts) == pytest.approx(wanted, rel=1e-9)
