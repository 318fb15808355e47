"""Which rows a step uses: each once an epoch, the same for any number of workers."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.sampler import Sampler, steps_per_epoch

NUMBERS = st.integers(1, 200)


@given(rows=NUMBERS, batch=NUMBERS, seed=st.none() | st.integers(0, 2**62), epoch=st.integers(0, 3))
def test_every_row_stands_in_exactly_one_step_of_an_epoch(
    rows: int, batch: int, seed: int | None, epoch: int
) -> None:
    steps = steps_per_epoch(rows, batch)
    order = Sampler(rows, batch, seed)
    used = [order.rows(epoch * steps + s) for s in range(steps)]
    assert sorted(np.concatenate(used)) == list(range(rows))
    assert all(len(part) == batch for part in used[:-1])


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    first = Sampler(100, 100, 0).rows(0)
    assert (first == Sampler(100, 100, 0).rows(0)).all()
    assert (first != Sampler(100, 100, 0).rows(1)).any()
    assert (first != Sampler(100, 100, 1).rows(0)).any()
    assert (Sampler(100, 100, None).rows(5) == np.arange(100)).all()


@given(rows=st.integers(1, 700), batch=st.integers(1, 9), seed=st.integers(0, 99))
def test_buckets_hold_rows_of_similar_length_and_every_row_once(
    rows: int, batch: int, seed: int
) -> None:
    lengths = np.random.default_rng(seed).integers(1, 100, rows)
    order, steps = Sampler(rows, batch, seed, lengths), steps_per_epoch(rows, batch)
    used = [order.rows(s) for s in range(steps)]
    assert sorted(np.concatenate(used)) == list(range(rows))
    anew = Sampler(rows, batch, seed, lengths).rows(steps - 1)
    assert (anew == used[-1]).all(), "what was asked for before does not matter"

    def padding(some: list[np.ndarray[Any, Any]]) -> int:
        return sum(len(part) * lengths[part].max() - lengths[part].sum() for part in some)

    mixed = [Sampler(rows, batch, seed).rows(s) for s in range(steps)]
    assert padding(used) <= padding(mixed)


def test_rows_as_they_stand_are_no_array_of_all_rows() -> None:
    order = Sampler(10**15, 4, None)  # 8 PB of them
    assert order.rows(10**9).tolist() == [4 * 10**9 + i for i in range(4)]
