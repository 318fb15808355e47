"""Which rows a step uses: each once an epoch, the same for any number of workers."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.partition import split_batch, subtrees, worker_range
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


@given(rows=NUMBERS, micro=st.none() | NUMBERS, workers=st.integers(1, 9))
def test_workers_take_contiguous_parts_that_make_up_the_batch(
    rows: int, micro: int | None, workers: int
) -> None:
    batch = np.random.default_rng(0).permutation(rows)
    pieces = split_batch(batch, micro, workers)
    numbers = [i for worker in range(workers) for i in worker_range(len(pieces), worker, workers)]
    assert numbers == list(range(len(pieces)))
    assert list(np.concatenate([pieces[i] for i in numbers])) == list(batch)


@given(rows=NUMBERS, micro=NUMBERS, workers=st.integers(1, 9))
def test_with_a_microbatch_size_the_cuts_do_not_depend_on_the_workers(
    rows: int, micro: int, workers: int
) -> None:
    batch = np.arange(rows)
    alone, together = split_batch(batch, micro, 1), split_batch(batch, micro, workers)
    assert all((a == b).all() for a, b in zip(alone, together, strict=True))
    assert all(len(piece) == micro for piece in alone[:-1])


@given(leaves=NUMBERS, workers=st.integers(1, 9))
def test_each_worker_owns_one_subtree_of_the_same_tree(leaves: int, workers: int) -> None:
    nodes: set[tuple[int, int]] = set()

    def grow(start: int, end: int) -> None:
        nodes.add((start, end))
        if end - start > 1:
            half = (start + end) // 2
            grow(start, half)
            grow(half, end)

    grow(0, leaves)
    ranges = subtrees(leaves, workers)
    assert set(ranges) <= nodes
    assert len(ranges) == min(workers, leaves)


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
