"""An order of which each place is computed: a permutation, and as random as a drawn one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.data.permutation import ROUNDS, permute

MANY = 1_000_003


def keys(seed: int) -> NDArray[np.uint64]:
    return np.random.default_rng(seed).integers(2**64, size=ROUNDS, dtype=np.uint64)


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**62))
def test_every_row_has_one_place(size: int, seed: int) -> None:
    rows = permute(np.arange(size), size, keys(seed))
    assert (np.sort(rows) == np.arange(size)).all()
    some = np.random.default_rng(seed).integers(0, size, 5)
    assert (permute(some, size, keys(seed)) == rows[some]).all()


def test_each_row_is_as_likely_in_each_place() -> None:
    counts = np.zeros((37, 37))
    for seed in range(10_000):
        counts[np.arange(37), permute(np.arange(37), 37, keys(seed))] += 1
    chi_squared, freedom = ((counts - 10_000 / 37) ** 2 / (10_000 / 37)).sum(), 36**2
    assert abs(chi_squared - freedom) < 3.5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("distance", [0, 1, 2, 1024])
def test_neighbours_and_places_do_not_tell_a_row(distance: int) -> None:
    for seed in range(5):
        rows = permute(np.arange(MANY), MANY, keys(seed))
        other = np.arange(MANY) if distance == 0 else np.roll(rows, distance)
        assert abs(np.corrcoef(rows, other)[0, 1]) * np.sqrt(MANY) < 4.5
