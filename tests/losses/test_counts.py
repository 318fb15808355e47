"""Losses of counts and costs: where they are least, and the edges of their ranges."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import nbinom  # type: ignore[import-untyped]
from sklearn.metrics import mean_tweedie_deviance
from statsmodels.discrete.count_model import (
    ZeroInflatedNegativeBinomialP,
    ZeroInflatedPoisson,
)

from pipeline import registry
from pipeline.losses.contract import build
from tests.losses.formulas import mean


@pytest.mark.parametrize(
    ("name", "options"), [("gamma", {}), ("tweedie", {"power": 1.3}), ("poisson_nll", {})]
)
def test_the_logarithm_of_the_mean_is_best(name: str, options: dict[str, Any]) -> None:
    truth = [0.5, 2.0, 7.5]
    best = float(np.log(np.mean(truth)))
    at_best = mean(name, [best] * 3, truth, **options)
    for other in (best - 0.1, best + 0.1):
        assert at_best < mean(name, [other] * 3, truth, **options)


def test_without_dispersion_a_negative_binomial_is_poissons() -> None:
    log_means, counts = [0.3, 1.2, 5.0], [0.0, 4.0, 130.0]
    expected = mean("poisson_nll", log_means, counts) + float(
        torch.lgamma(torch.tensor(counts, dtype=torch.float64) + 1).mean()
    )
    assert mean("negative_binomial", log_means, [0.0] * 3, counts) == pytest.approx(
        expected, rel=1e-4
    )


def test_likelihoods_in_float32_are_those_in_float64() -> None:
    given = [torch.tensor([0.3, 6.0]), torch.tensor([1e-6, 2.0]), torch.tensor([2.0, 900.0])]
    items = build(registry.losses["negative_binomial"], {}).items
    wide = items(*(tensor.double() for tensor in given))
    assert items(*given).tolist() == pytest.approx(wide.tolist(), rel=1e-6)
    assert items(*given).dtype == torch.float32


@pytest.mark.parametrize(("name", "power"), [("gamma", 2.0), ("tweedie", 1.3), ("tweedie", 1.8)])
def test_what_a_prediction_lacks_is_half_of_scikit_learns_deviance(name: str, power: float) -> None:
    log_means, truth = np.array([0.3, -1.0, 2.0]), np.array([0.5, 2.0, 7.5])
    options = {"power": power} if name == "tweedie" else {}
    lacking = mean(name, log_means, truth, **options) - mean(name, np.log(truth), truth, **options)
    wanted = mean_tweedie_deviance(truth, np.exp(log_means), power=power) / 2
    assert lacking == pytest.approx(wanted)


def test_a_negative_binomial_is_scipys() -> None:
    log_means, dispersion, counts = [0.3, 1.2, -2.0], [0.5, 3.0, 0.01], [0.0, 40.0, 1.0]
    sizes = 1 / np.array(dispersion)
    likelihoods = nbinom.logpmf(counts, sizes, sizes / (sizes + np.exp(log_means)))
    got = mean("negative_binomial", log_means, dispersion, counts)
    assert got == pytest.approx(-likelihoods.mean())


@pytest.mark.parametrize("kind", ["poisson", "negative_binomial"])
def test_counts_with_too_many_zeros_are_statsmodels(kind: str) -> None:
    counts = np.array([0.0, 0.0, 3.0, 1.0, 40.0])
    log_mean, logit, dispersion = 1.3, -0.4, 0.7
    ones = np.ones((5, 1))
    outputs = [[log_mean] * 5, [logit] * 5]
    if kind == "poisson":
        own = ZeroInflatedPoisson(counts, ones, exog_infl=ones)
        wanted = own.loglike(np.array([logit, log_mean]))
    else:
        own = ZeroInflatedNegativeBinomialP(counts, ones, exog_infl=ones, p=2)
        wanted = own.loglike(np.array([logit, log_mean, dispersion]))
        outputs.insert(1, [dispersion] * 5)
    found = mean(f"zero_inflated_{kind}", *outputs, counts)
    assert -found * 5 == pytest.approx(wanted, rel=1e-6)
