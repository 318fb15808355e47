"""Losses of amounts by formulas that anyone can check by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import mean_pinball_loss

from pipeline import registry
from pipeline.losses.contract import build
from tests.losses.formulas import mean

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("mse", {}, (0.04 + 0.09 + 4.0) / 3),
        ("l1", {}, (0.2 + 0.3 + 2.0) / 3),
        ("smooth_l1", {"beta": 1.0}, (0.5 * 0.04 + 0.5 * 0.09 + 2.0 - 0.5) / 3),
        ("huber", {"delta": 0.5}, (0.5 * 0.04 + 0.5 * 0.09 + 0.5 * (2.0 - 0.25)) / 3),
    ],
)
def test_amounts_that_are_missed_by_fractions_and_by_two(
    name: str, options: dict[str, float], expected: float
) -> None:
    assert mean(name, [1.2, 2.3, 5.0], [1.0, 2.0, 3.0], **options) == pytest.approx(expected)


def test_poisson_likelihood_of_a_log_rate() -> None:
    expected = ((math.exp(0.5) - 2 * 0.5) + (math.exp(1.0) - 0 * 1.0)) / 2
    assert mean("poisson_nll", [0.5, 1.0], [2.0, 0.0]) == pytest.approx(expected)


def test_normal_likelihood_of_a_mean_and_a_variance() -> None:
    expected = (0.5 * (math.log(4.0) + 1 / 4) + 0.5 * (math.log(0.25) + 0.25 / 0.25)) / 2
    assert mean("gaussian_nll", [1.0, 2.0], [4.0, 0.25], [2.0, 1.5]) == pytest.approx(expected)


def test_quantiles_are_judged_as_by_scikit_learn() -> None:
    truth, predicted = RNG.normal(size=40), RNG.normal(size=(40, 3))
    levels = [0.1, 0.5, 0.95]
    wanted = np.mean([
        mean_pinball_loss(truth, predicted[:, place], alpha=level)
        for place, level in enumerate(levels)
    ])  # fmt: skip
    assert mean("pinball", predicted, truth, levels=levels) == pytest.approx(wanted)


def test_the_best_constants_are_the_quantiles() -> None:
    truth = np.arange(1.0, 102.0)
    best = np.quantile(truth, [0.1, 0.9])
    at_best = mean("pinball", np.tile(best, (101, 1)), truth, levels=[0.1, 0.9])
    for shift in ([1.5, 0], [-1.5, 0], [0, 1.5], [0, -1.5]):
        moved = np.tile(best + shift, (101, 1))
        assert mean("pinball", moved, truth, levels=[0.1, 0.9]) > at_best


def test_served_quantiles_never_cross() -> None:
    loss = build(registry.losses["pinball"], {"levels": [0.1, 0.5, 0.9]})
    assert loss.link is not None
    assert loss.link(torch.tensor([[3.0, 1.0, 2.0]])).tolist() == [[1.0, 2.0, 3.0]]


def test_levels_that_do_not_rise_are_refused() -> None:
    with pytest.raises(ValueError, match="must rise"):
        build(registry.losses["pinball"], {"levels": [0.9, 0.1]})
