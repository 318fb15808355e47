"""Losses of times that are not all seen: statsmodels' Cox model, and curves counted by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from statsmodels.duration.hazard_regression import PHReg

from pipeline import registry
from pipeline.losses.contract import build
from tests.losses.formulas import mean

RNG = np.random.default_rng(0)
N = 60
INPUTS = RNG.normal(size=(N, 3))
TIME = RNG.integers(1, 15, N).astype(float)  # many are equal
HAPPENED = (RNG.random(N) < 0.6).astype(float)
TRUTH = np.stack([TIME, HAPPENED], axis=1)


@pytest.mark.parametrize("ties", ["efron", "breslow"])
def test_coxs_likelihood_is_statsmodels(ties: str) -> None:
    own = PHReg(TIME, INPUTS, status=HAPPENED, ties=ties)
    for weight in RNG.normal(size=(3, 3)):
        found = mean("cox", INPUTS @ weight, TRUTH, ties=ties)
        assert -found * N == pytest.approx(own.loglike(weight), rel=1e-12)


def test_one_level_for_all_changes_no_likelihood_however_large() -> None:
    risk = INPUTS[:, 0]
    assert mean("cox", risk + 700, TRUTH) == pytest.approx(mean("cox", risk, TRUTH), rel=1e-10)


def test_rows_of_which_nothing_is_known_cost_nothing() -> None:
    truth = torch.tensor([[3.0, 0.0], [5.0, 0.0]])
    given = torch.zeros(2, requires_grad=True)
    loss = build(registry.losses["cox"], {"ties": "efron"}).items(given, truth)
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss) == 0
    assert given.grad is not None
    assert given.grad.tolist() == [0, 0]


def test_the_best_hazards_are_kaplan_and_meiers() -> None:
    """Of rows that are alike, where all are seen to the end of a stretch."""
    truth = torch.tensor([[0.5, 1.0], [1.0, 1.0], [1.5, 1.0], [2.0, 0.0], [9.0, 1.0]])
    loss = build(registry.losses["hazards"], {"times": [1.0, 2.0]})
    logits = torch.zeros(2, requires_grad=True)
    steps = torch.optim.LBFGS([logits], max_iter=100, tolerance_grad=1e-10)

    def closure() -> Any:
        steps.zero_grad()
        total = loss.items(logits.expand(len(truth), 2), truth).sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    steps.step(closure)  # type: ignore[no-untyped-call]
    assert loss.link is not None
    served = loss.link(logits.detach()[None])[0]
    assert served.tolist() == pytest.approx([3 / 5, 3 / 5 * 2 / 3], rel=1e-4)


@pytest.mark.parametrize("times", [[2.0, 1.0], [1.0, 1.0]])
def test_times_rise(times: list[float]) -> None:
    with pytest.raises(ValueError, match="rise"):
        build(registry.losses["hazards"], {"times": times})
