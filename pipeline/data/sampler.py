"""Which rows a step uses: computed from (number of rows, seed, epoch, step), never iterated."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.data.permutation import ROUNDS, permute

Rows = NDArray[np.int64]


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
    """Steps that use each row once; the last batch is as short as it is."""
    return -(-num_rows // batch_size)


WINDOW = 64
"""Batches among which rows are exchanged to bring those of one length together."""
MANY_ROWS = 2**20
"""From here on an epoch's order is not kept: a batch's part of it is computed (1e9 rows in a
permutation are 8 GB and a minute in each worker)."""


def generator_of(seed: int | None, epoch: int, window: int = 0) -> np.random.Generator:
    """Draws that belong to an epoch, or to one part of it, whatever was drawn for others."""
    assert seed is not None, "rows as they stand draw nothing"
    counter = np.array([0, 0, 0, window], np.uint64)  # the last word is never reached
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=counter))


class Sampler:
    """The rows of each step, the same for any number of workers.

    A new permutation each epoch, drawn from `seed`; without one, rows as they stand. With `lengths`
    (one for each row) batches hold rows of similar length: a window of 64 batches is sorted by
    length, and its batches then come in any order; the last, shorter batch is as it falls.
    """

    def __init__(
        self, num_rows: int, batch_size: int, seed: int | None, lengths: Rows | None = None
    ) -> None:
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.seed = seed
        self.lengths = lengths
        self._epochs: dict[int, Rows] = {}
        self._windows: dict[tuple[int, int], Rows] = {}

    def rows(self, step: int) -> Rows:
        """Rows of the global batch of `step` (from 0): computed, whatever was asked for before."""
        epoch, batch = divmod(step, steps_per_epoch(self.num_rows, self.batch_size))
        start = batch * self.batch_size
        end = min(start + self.batch_size, self.num_rows)
        if self.seed is None:
            return np.arange(start, end)
        if self.lengths is None:
            return self._order(epoch, start, end)
        window, batch_in_window = divmod(batch, WINDOW)
        first = batch_in_window * self.batch_size
        return self._by_length(epoch, window, self.lengths)[first : first + end - start]

    def blocks(self, step: int) -> list[int]:
        """Blocks needed from `step` on: none, as rows of this sampler are not in blocks."""
        return []

    def _order(self, epoch: int, start: int, end: int) -> Rows:
        """A part of the epoch's order."""
        if self.num_rows < MANY_ROWS:
            return self._epoch(epoch)[start:end]
        keys = generator_of(self.seed, epoch).integers(2**64, size=ROUNDS, dtype=np.uint64)
        return permute(np.arange(start, end), self.num_rows, keys)

    def _epoch(self, epoch: int) -> Rows:
        if epoch not in self._epochs:
            self._epochs = {epoch: generator_of(self.seed, epoch).permutation(self.num_rows)}
        return self._epochs[epoch]

    def _by_length(self, epoch: int, window: int, lengths: Rows) -> Rows:
        """The rows of a window of batches, in the order in which they are used."""
        if (epoch, window) not in self._windows:
            start = window * WINDOW * self.batch_size
            end = min(start + WINDOW * self.batch_size, self.num_rows)
            whole = (end - start) // self.batch_size * self.batch_size
            rows = self._order(epoch, start, end)
            by_length = rows[np.argsort(lengths[rows[:whole]], kind="stable")]
            batches = by_length.reshape(-1, self.batch_size)
            mixed = generator_of(self.seed, epoch, window + 1).permutation(batches).ravel()
            self._windows = {(epoch, window): np.concatenate([mixed, rows[whole:]])}
        return self._windows[epoch, window]


class WeightedSampler(Sampler):
    """A Sampler whose epochs have some rows more often than others.

    An epoch has `num_rows` rows, each as often as its share of the `weights` [N] says, rounded up
    or down: points at equal distances on the weights laid end to end in a new order, which is
    systematic sampling (Madow and Madow, 1944).
    """

    def __init__(
        self,
        weights: NDArray[np.float64],
        num_rows: int,
        batch_size: int,
        seed: int,
        classes: Rows | None = None,
    ) -> None:
        """With `classes` [N] these come as often as their share too, up to one row."""
        super().__init__(num_rows, batch_size, seed)
        self.weights, self.classes = weights, classes

    def _order(self, epoch: int, start: int, end: int) -> Rows:
        return self._epoch(epoch)[start:end]

    def _epoch(self, epoch: int) -> Rows:
        if epoch not in self._epochs:
            generator = generator_of(self.seed, epoch)
            order = generator.permutation(len(self.weights))
            if self.classes is not None:  # one class after the other
                order = order[np.argsort(self.classes[order], kind="stable")]
            ends = np.cumsum(self.weights[order])
            points = (np.arange(self.num_rows) + generator.random()) * (ends[-1] / self.num_rows)
            places = np.searchsorted(ends, points, side="right")
            last = np.flatnonzero(self.weights[order])[-1]  # a sum may round below its last point
            self._epochs = {epoch: generator.permutation(order[np.minimum(places, last)])}
        return self._epochs[epoch]


class WindowSampler:
    """A Sampler for rows in blocks of which only a few are on this machine at a time.

    Each epoch draws the blocks in a new order; so many of them in turn are a window, whose rows are
    mixed. A step's number determines its rows: no more than its windows is computed.
    """

    def __init__(
        self, bounds: Rows, batch_size: int, seed: int | None, window: int, epochs: int = 2**62
    ) -> None:
        self.bounds, self.batch_size, self.seed, self.epochs = bounds, batch_size, seed, epochs
        """`bounds`: the first row of each block, and the number of all rows."""
        self.num_rows = int(bounds[-1])
        self._full = np.flatnonzero(np.diff(bounds))
        self.window = min(window, len(self._full))
        self._epochs: dict[int, tuple[Rows, Rows]] = {}
        self._windows: dict[tuple[int, int], Rows] = {}

    def rows(self, step: int) -> Rows:
        """Rows of the global batch of `step` (from 0): computed, whatever was asked for before."""
        epoch, batch = divmod(step, steps_per_epoch(self.num_rows, self.batch_size))
        start = batch * self.batch_size
        parts = []
        for window_index in self._windows_of(epoch, batch):
            first = int(self._epoch(epoch)[1][window_index])
            rows = self._mix(epoch, window_index)
            parts.append(rows[max(start - first, 0) : start + self.batch_size - first])
        return np.concatenate(parts)

    def blocks(self, step: int) -> list[int]:
        """Blocks of the windows that the step uses, and of the one after them, in order."""
        epoch, batch = divmod(step, steps_per_epoch(self.num_rows, self.batch_size))
        windows = [(epoch, window_index) for window_index in self._windows_of(epoch, batch)]
        is_last = windows[-1][1] + 2 == len(self._epoch(epoch)[1])
        if not is_last:
            windows.append((epoch, windows[-1][1] + 1))
        elif epoch + 1 < self.epochs:
            windows.append((epoch + 1, 0))
        blocks = [block for window in windows for block in self._blocks(*window)]
        return [int(block) for block in dict.fromkeys(blocks)]

    def _epoch(self, epoch: int) -> tuple[Rows, Rows]:
        """The blocks that have rows in the epoch's order; where its windows start, and end."""
        if epoch not in self._epochs:
            order = self._full
            if self.seed is not None:
                order = generator_of(self.seed, epoch).permutation(order)
            sizes = np.diff(self.bounds)[order]
            per_window = np.add.reduceat(sizes, np.arange(0, len(order), self.window))
            if len(self._epochs) > 1:
                self._epochs.clear()
            self._epochs[epoch] = (order, np.concatenate([[0], np.cumsum(per_window)]))
        return self._epochs[epoch]

    def _windows_of(self, epoch: int, batch: int) -> range:
        """Numbers of the windows that one of the epoch's batches uses."""
        start = batch * self.batch_size
        starts = self._epoch(epoch)[1]
        last = min(start + self.batch_size, self.num_rows) - 1
        first_window, last_window = np.searchsorted(starts, [start, last], "right") - 1
        return range(int(first_window), int(last_window) + 1)

    def _blocks(self, epoch: int, window_index: int) -> Rows:
        return self._epoch(epoch)[0][window_index * self.window : (window_index + 1) * self.window]

    def _mix(self, epoch: int, window_index: int) -> Rows:
        """The rows of a window in the order in which they are used."""
        if (epoch, window_index) not in self._windows:
            blocks = self._blocks(epoch, window_index)
            rows = np.concatenate([np.arange(*self.bounds[block : block + 2]) for block in blocks])
            if self.seed is not None:
                rows = generator_of(self.seed, epoch, window_index + 1).permutation(rows)
            if len(self._windows) > 2:
                self._windows.pop(next(iter(self._windows)))
            self._windows[epoch, window_index] = rows
        return self._windows[epoch, window_index]
