"""Without micro-batches, curves of different numbers of workers agree to rounding."""

from __future__ import annotations

from functools import cache

import pytest

from tests.benchmarks import curves
from tests.scenarios.test_same_bits import JOB_NAMES

WORKERS = 3  # two cannot show an order of sums
# The hardest triplets are chosen by comparing distances, and Adam makes a step of its full length
# from a gradient that is rounding alone: last bits of a float32 grow by themselves.
TOUCHY = "embedding"


@cache
def table(precision: str) -> dict[str, list[float]]:
    return curves.table(precision, (WORKERS,))


@pytest.mark.jobs
@pytest.mark.parametrize("name", [name for name in JOB_NAMES if name != TOUCHY])
def test_fifty_losses_agree_to_rounding(name: str) -> None:
    (apart,) = table("float32")[name]
    print(f"{name}: largest relative difference {apart:.1e}")
    assert apart < 1e-5


@pytest.mark.jobs
@pytest.mark.chaos
def test_the_touchy_job_agrees_where_rounding_is_small() -> None:
    (apart,) = table("float64")[TOUCHY]
    assert apart < 1e-10
