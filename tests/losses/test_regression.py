"""Losses of amounts by formulas that anyone can check by hand."""

from __future__ import annotations

import math

import pytest

from tests.losses.formulas import mean


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
