"""Batches on their way to the steps: gathered by a thread that is some steps ahead."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from pipeline.data.batch import Batch
from pipeline.data.dataset import Buffer, Dataset
from pipeline.data.partition import split_batch, worker_range
from pipeline.data.sampler import Rows, Sampler, WindowSampler

PREFETCH = 2
"""Batches that wait, gathered, for the step that is computed."""


@dataclass(eq=False)
class StepBatch:
    """One step's global batch, as far as this worker has it."""

    step: int
    """From 0."""
    rows: list[Rows]
    """Rows of all micro-batches, whoever computes them."""
    microbatches: list[tuple[int, Batch]]
    """Those that this worker computes, with their index; valid until the next batch is taken."""
    counts: dict[int, Tensor]
    """What each of these adds to the denominators of the losses: float64 [K], by its index."""
    denominators: Tensor | None = None
    """What the global batch counts: float64 [K]; known once all workers' counts are summed."""
    next: StepBatch | None = None
    """The batch of the following step, if there is one."""

    @property
    def num_rows(self) -> int:
        """Rows of the global batch."""
        return sum(map(len, self.rows))

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of the global batch."""
        return len(self.rows)


@dataclass(frozen=True)
class Partition:
    """How batches are cut, and which worker this is."""

    microbatch_size: int | None = None
    worker: int = 0
    num_workers: int = 1


_Gathered = tuple[StepBatch, list[Buffer]]
"""A batch, and the buffers that its rows stand in."""


class Loader:
    """The batches of `steps` in order, each with the one after it as `next`.

    `count(batch)` is what the losses count in one micro-batch: float64 [K]. Buffers are reused: a
    batch is valid until the next one is taken. An error of the thread is raised one step before the
    one that it is about, as that one's counts are needed there.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: Sampler | WindowSampler,
        count: Callable[[Batch], Tensor],
        steps: range,
        partition: Partition,
        pinned: bool = False,
    ) -> None:
        self.dataset = dataset
        self.sampler = sampler
        self.count = count
        self.steps = steps
        self.partition = partition
        self.pinned = pinned
        self._ready: queue.SimpleQueue[_Gathered | BaseException] = queue.SimpleQueue()
        self._free: queue.SimpleQueue[list[Buffer] | None] = queue.SimpleQueue()
        for _ in range(PREFETCH + 2):
            self._free.put([])
        self._thread = threading.Thread(target=self._gather_all, name="loader", daemon=True)

    def __enter__(self) -> Loader:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._free.put(None)
        self.dataset.interrupt()
        self._thread.join()

    def __iter__(self) -> Iterator[StepBatch]:
        if not self.steps:
            return
        batch, buffers = self._take()
        for _ in self.steps[1:]:
            batch.next, next_buffers = self._take()
            yield batch
            self._free.put(buffers)
            batch, buffers = batch.next, next_buffers
        yield batch

    def _take(self) -> _Gathered:
        gathered = self._ready.get()
        if isinstance(gathered, BaseException):
            raise gathered
        return gathered

    def _gather_all(self) -> None:
        try:
            for step in self.steps:
                buffers = self._free.get()
                if buffers is None:
                    return
                self._ready.put((self._gather(step, buffers), buffers))
        except BaseException as error:
            self._ready.put(error)

    def _gather(self, step: int, buffers: list[Buffer]) -> StepBatch:
        self.dataset.expect(self.sampler.blocks(step))
        cut = self.partition
        rows = split_batch(self.sampler.rows(step), cut.microbatch_size, cut.num_workers)
        microbatches: list[tuple[int, Batch]] = []
        own = worker_range(len(rows), cut.worker, cut.num_workers)
        for slot, index in enumerate(own):
            size = len(rows[index])
            if slot == len(buffers):
                buffers.append(Buffer(self.dataset.layout, size, self.pinned))
            if buffers[slot].num_rows < size:
                buffers[slot] = Buffer(self.dataset.layout, size, self.pinned)
            microbatches.append((index, self.dataset.gather(rows[index], buffers[slot])))
        counts = {index: self.count(batch) for index, batch in microbatches}
        return StepBatch(step, rows, microbatches, counts)
