"""Which rows a step uses: computed from (number of rows, seed, epoch, step), never iterated."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
    """Steps that use each row once; the last batch is as short as it is."""
    return -(-num_rows // batch_size)


@lru_cache(maxsize=2)
def epoch_order(num_rows: int, seed: int | None, epoch: int) -> Rows:
    """All rows in the order of `epoch` (from 0); without a seed, as they stand."""
    if seed is None:
        return np.arange(num_rows)
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_rows)


def rows_of_step(num_rows: int, batch_size: int, seed: int | None, step: int) -> Rows:
    """Rows of the global batch of `step` (from 0), the same for any number of workers."""
    epoch, place = divmod(step, steps_per_epoch(num_rows, batch_size))
    return epoch_order(num_rows, seed, epoch)[place * batch_size : (place + 1) * batch_size]


def cut(rows: Rows, microbatch_size: int | None, num_workers: int) -> list[Rows]:
    """The micro-batches of a global batch, in order; none is empty.

    With `microbatch_size` the cuts are the same for any number of workers; without it each worker
    has one micro-batch, its even share.
    """
    if microbatch_size is None:
        return [part for part in np.array_split(rows, num_workers) if len(part)]
    return [rows[start : start + microbatch_size] for start in range(0, len(rows), microbatch_size)]


def middle(start: int, end: int) -> int:
    """Where the tree of micro-batches halves a range."""
    return (start + end) // 2


@lru_cache(maxsize=8)
def subtrees(num_microbatches: int, num_workers: int) -> tuple[tuple[int, int], ...]:
    """The range of micro-batches of each worker that has any: subtrees of one binary tree.

    The largest subtree is halved until there is one for each worker, or only leaves are left.
    """
    found = [(0, num_microbatches)] if num_microbatches else []
    while len(found) < min(num_workers, num_microbatches):
        largest = max(range(len(found)), key=lambda i: (found[i][1] - found[i][0], -i))
        start, end = found[largest]
        found[largest : largest + 1] = [(start, middle(start, end)), (middle(start, end), end)]
    return tuple(found)


def owned(num_microbatches: int, worker: int, num_workers: int) -> range:
    """Numbers of the micro-batches that this worker computes; none where there are too few."""
    ranges = subtrees(num_microbatches, num_workers)
    return range(*ranges[worker]) if worker < len(ranges) else range(0)
