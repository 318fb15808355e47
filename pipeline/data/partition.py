"""A global batch cut into micro-batches, and which worker computes which of them.

The micro-batches are the leaves of one binary tree that halves their range at its midpoint; each
worker computes a subtree. Sums that follow the tree have the same operands on any number of workers
(see `pipeline.distributed.ordered`).
"""

from __future__ import annotations

import heapq
from functools import lru_cache

import numpy as np

from pipeline.data.sampler import Rows


def split_batch(rows: Rows, microbatch_size: int | None, num_workers: int) -> list[Rows]:
    """The micro-batches of a global batch, in order; none is empty.

    With `microbatch_size` the cuts are the same for any number of workers; without it each worker
    has one micro-batch, its even share.
    """
    if microbatch_size is None:
        return [part for part in np.array_split(rows, num_workers) if len(part)]
    return [rows[start : start + microbatch_size] for start in range(0, len(rows), microbatch_size)]


def midpoint(start: int, end: int) -> int:
    """Where the tree halves a range of micro-batches."""
    return (start + end) // 2


@lru_cache(maxsize=8)
def subtrees(num_microbatches: int, num_workers: int) -> tuple[tuple[int, int], ...]:
    """The range of micro-batches of each worker that has any.

    The largest subtree is halved until there is one for each worker, or only leaves are left.
    """
    if not num_microbatches:
        return ()
    largest_first = [(-num_microbatches, 0, num_microbatches)]  # a heap
    while len(largest_first) < min(num_workers, num_microbatches):
        _, start, end = heapq.heappop(largest_first)
        half = midpoint(start, end)
        for first, last in ((start, half), (half, end)):
            heapq.heappush(largest_first, (first - last, first, last))
    return tuple(sorted((start, end) for _, start, end in largest_first))


def worker_range(num_microbatches: int, worker: int, num_workers: int) -> range:
    """Indices of the micro-batches that this worker computes; none where there are too few."""
    ranges = subtrees(num_microbatches, num_workers)
    return range(*ranges[worker]) if worker < len(ranges) else range(0)
