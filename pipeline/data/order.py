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


def microbatches(
    rows: Rows, microbatch_size: int | None, worker: int, num_workers: int
) -> list[tuple[int, Rows]]:
    """This worker's micro-batches as (number within the global batch, rows).

    Workers take contiguous parts. With `microbatch_size` the cuts are the same for any number of
    workers; without it each worker has one micro-batch, its even share. A worker may get none.
    """
    if microbatch_size is None:
        pieces = list(np.array_split(rows, num_workers))
    else:
        pieces = [
            rows[start : start + microbatch_size] for start in range(0, len(rows), microbatch_size)
        ]
    first, last = (len(pieces) * (worker + i) // num_workers for i in (0, 1))
    return [(i, pieces[i]) for i in range(first, last) if len(pieces[i])]
