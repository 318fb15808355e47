"""Schedules: pure functions of the step, between 0 and 1."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.schedules import learning_rate_factor
from tests.conftest import built_in

OPTIONS: dict[str, dict[str, Any]] = {"step": {"every_steps": 10}}


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
