"""How a batch is cut into micro-batches, and which worker takes which."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.partition import split_batch, subtrees, worker_range

NUMBERS = st.integers(1, 200)


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


def test_without_a_microbatch_size_each_worker_has_one_share() -> None:
    shares = split_batch(np.arange(7), None, 3)
    assert [list(share) for share in shares] == [[0, 1, 2], [3, 4], [5, 6]]
    assert [list(worker_range(3, rank, 3)) for rank in range(3)] == [[0], [1], [2]]
