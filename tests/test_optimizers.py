"""Optimizers take what torch takes; schedules are pure functions of the step."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline import registry
from pipeline.schedules import learning_rate_factor
from tests.conftest import built_in

OPTIONS: dict[str, dict[str, Any]] = {"step": {"every_steps": 10}}


@pytest.mark.parametrize("name", built_in("optimizers"))
def test_every_optimizer_lowers_a_loss(name: str) -> None:
    weight = torch.nn.Parameter(torch.full((3, 3), 2.0))
    optimizer = registry.optimizers[name].build([weight])
    for _ in range(20):
        optimizer.zero_grad()
        (weight**2).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert float((weight**2).sum().detach()) < 36


@pytest.mark.parametrize("name", built_in("optimizers"))
def test_defaults_are_torchs_own(name: str) -> None:
    entry = registry.optimizers[name]
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    theirs = inspect.signature(type(entry.build([weight])).__init__).parameters
    for option, field in entry.options.model_fields.items():
        assert field.default == theirs[option].default, option


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


def test_the_others_are_what_their_line_says() -> None:
    assert learning_rate_factor("linear", {}, 0, 50, 100) == 0.5
    assert learning_rate_factor("step", {"every_steps": 10, "factor": 0.5}, 0, 25, 100) == 0.25
    assert learning_rate_factor("exponential", {"final": 0.01}, 0, 50, 100) == pytest.approx(0.1)
    assert learning_rate_factor("inverse_sqrt", {"scale_steps": 1}, 0, 3, 9) == 1 / math.sqrt(4)
    assert learning_rate_factor("constant", {}, 0, 3, 9) == 1.0
