"""Which rows a step uses: computed from (number of rows, seed, epoch, step), never iterated."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
    """Steps that use each row once; the last batch is as short as it is."""
    return -(-num_rows // batch_size)


WINDOW = 64
"""Batches among which rows are exchanged to bring those of one length together."""


class Order:
    """The rows of each step, the same for any number of workers.

    A new permutation each epoch, drawn from `seed`; without one, rows as they stand. With `lengths`
    (one for each row) batches hold rows of similar length: a window of 64 batches is sorted by
    length, and its batches then come in any order; the last, shorter batch is as it falls.
    """

    def __init__(
        self, num_rows: int, batch_size: int, seed: int | None, lengths: Rows | None = None
    ) -> None:
        self.num_rows, self.batch_size, self.seed = num_rows, batch_size, seed
        self.lengths = lengths
        self._epochs: dict[int, Rows] = {}

    def rows(self, step: int) -> Rows:
        """Rows of the global batch of `step` (from 0): computed, whatever was asked for before."""
        epoch, place = divmod(step, steps_per_epoch(self.num_rows, self.batch_size))
        return self._epoch(epoch)[place * self.batch_size : (place + 1) * self.batch_size]

    def _epoch(self, epoch: int) -> Rows:
        if self.seed is None:
            return np.arange(self.num_rows)
        if epoch not in self._epochs:
            generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            order = generator.permutation(self.num_rows)
            if self.lengths is not None:
                order = self._by_length(order, self.lengths, generator)
            self._epochs = {epoch: order}
        return self._epochs[epoch]

    def _by_length(self, order: Rows, lengths: Rows, generator: np.random.Generator) -> Rows:
        whole = len(order) // self.batch_size * self.batch_size
        found = order.copy()
        for start in range(0, whole, WINDOW * self.batch_size):
            window = order[start : min(start + WINDOW * self.batch_size, whole)]
            batches = window[np.argsort(lengths[window], kind="stable")].reshape(
                -1, self.batch_size
            )
            found[start : start + len(window)] = generator.permutation(batches).ravel()
        return found


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
