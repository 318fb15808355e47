"""Schedules: pure functions of the step, between 0 and 1."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler as lrs

from pipeline.schedules import learning_rate_factor
from pipeline.spec import load
from pipeline.train.job import prepare
from tests.conftest import JOBS, built_in

OPTIONS: dict[str, dict[str, Any]] = {
    "step": {"every_steps": 10}, "multistep": {"steps": [10, 500]},
    "cosine_restarts": {"cycle_steps": 100, "growth": 2},
}  # fmt: skip


@pytest.mark.parametrize("name", built_in("schedules"))
@given(step=st.integers(0, 999), warmup=st.integers(0, 100))
def test_a_schedule_stays_between_zero_and_one(name: str, step: int, warmup: int) -> None:
    factor = learning_rate_factor(name, OPTIONS.get(name, {}), warmup, step, 1000)
    assert 0 <= factor <= 1


def test_warmup_rises_to_the_full_rate_and_cosine_falls_to_its_end() -> None:
    def at(step: int) -> float:
        return learning_rate_factor("cosine", {"final": 0.1}, 10, step, 110)

    assert [at(0), at(4), at(9)] == pytest.approx([0.1, 0.5, 1.0])
    assert at(10) == 1.0
    assert at(60) == pytest.approx(0.55)
    assert at(109) == pytest.approx(0.1, abs=1e-3)


def test_each_schedule_is_its_formula() -> None:
    assert learning_rate_factor("linear", {}, 0, 50, 100) == 0.5
    assert learning_rate_factor("step", {"every_steps": 10, "factor": 0.5}, 0, 25, 100) == 0.25
    assert learning_rate_factor("exponential", {"final": 0.01}, 0, 50, 100) == pytest.approx(0.1)
    assert learning_rate_factor("inverse_sqrt", {"scale_steps": 1}, 0, 3, 9) == 1 / math.sqrt(4)
    assert learning_rate_factor("constant", {}, 0, 3, 9) == 1.0


@pytest.mark.parametrize(
    ("schedule", "build"),
    [
        ({"name": "multistep", "steps": [2, 3], "factor": 0.5},
         lambda own: lrs.MultiStepLR(own, [2, 3], 0.5)),
        ({"name": "step", "every_steps": 2}, lambda own: lrs.StepLR(own, 2)),
        ({"name": "cosine"}, lambda own: lrs.CosineAnnealingLR(own, 5)),
        ({"name": "linear", "warmup_steps": 2}, None),
    ],
)  # fmt: skip
def test_by_epoch_it_is_torchs_stepped_once_an_epoch(schedule: Any, build: Any) -> None:
    """Of an epoch of 12 steps the whole has one rate."""
    changes = {"schedule": {**schedule, "by": "epoch"}, "training.epochs": 5}
    job = prepare(load(JOBS / "diabetes.yaml", changes), JOBS)
    num = job.steps_per_epoch
    found = [job.learning_rate_factor(step) for step in range(job.num_steps)]
    assert all(rate == found[step // num * num] for step, rate in enumerate(found))
    wanted = of_torch(build, 5) if build else [0.5, 1.0, 1.0, 2 / 3, 1 / 3]
    assert found[::num] == pytest.approx(wanted)


def of_torch(build: Callable[[torch.optim.Optimizer], Any], num_steps: int) -> list[float]:
    """The learning rate of each step, of an optimizer whose own is 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build(optimizer)
    rates = []
    for _ in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


NUM_STEPS = 60
LIKE_TORCH: list[tuple[str, dict[str, Any], Callable[[torch.optim.Optimizer], Any]]] = [
    ("cosine", {"final": 0.1}, partial(lrs.CosineAnnealingLR, T_max=NUM_STEPS, eta_min=0.1)),
    ("step", {"every_steps": 7, "factor": 0.3}, partial(lrs.StepLR, step_size=7, gamma=0.3)),
    (
        "one_cycle", {},
        partial(lrs.OneCycleLR, max_lr=1.0, total_steps=NUM_STEPS, cycle_momentum=False),
    ),
    (
        "one_cycle", {"rise": 0.45, "start": 0.1, "final": 0.001},
        partial(
            lrs.OneCycleLR, max_lr=1.0, total_steps=NUM_STEPS, pct_start=0.45, div_factor=10.0,
            final_div_factor=100.0, cycle_momentum=False,
        ),
    ),
    ("polynomial", {"power": 2.5}, partial(lrs.PolynomialLR, total_iters=NUM_STEPS, power=2.5)),
    (
        "multistep", {"steps": [5, 17, 17], "factor": 0.5},
        partial(lrs.MultiStepLR, milestones=[5, 17, 17], gamma=0.5),
    ),
    (
        "cosine_restarts", {"cycle_steps": 7},
        partial(lrs.CosineAnnealingWarmRestarts, T_0=7),
    ),
    (
        "cosine_restarts", {"cycle_steps": 9, "growth": 2, "final": 0.2},
        partial(lrs.CosineAnnealingWarmRestarts, T_0=9, T_mult=2, eta_min=0.2),
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "build"), LIKE_TORCH, ids=[one[0] for one in LIKE_TORCH]
)
def test_a_schedule_is_that_of_torch(
    name: str, options: dict[str, Any], build: Callable[[torch.optim.Optimizer], Any]
) -> None:
    own = [learning_rate_factor(name, options, 0, step, NUM_STEPS) for step in range(NUM_STEPS)]
    assert own == pytest.approx(of_torch(build, NUM_STEPS), abs=1e-12)
