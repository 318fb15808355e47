"""Each step's rows on their way to the step: gathered by a thread that is some steps ahead."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType

from torch import Tensor

from pipeline.data.batch import Batch
from pipeline.data.order import Rows
from pipeline.data.store import Buffer, Store

AHEAD = 2
"""Steps that wait, gathered, for the one that is computed."""


@dataclass(frozen=True)
class Share:
    """A worker's part of one step's global batch."""

    step: int
    pieces: list[Rows]
    """Rows of all the batch's micro-batches, whoever computes them."""
    own: list[tuple[int, Batch]]
    """This worker's micro-batches that have rows, with their numbers; good until the next step."""
    counts: dict[int, Tensor]
    """What the losses count in each of them."""

    @property
    def num_rows(self) -> int:
        """Rows of the global batch."""
        return sum(map(len, self.pieces))


class Feed:
    """Shares of the steps from `first` to `last` in order, each with the one that follows it.

    `pieces(step)` are the step's micro-batches, `own(n)` the numbers of those that this worker
    computes when there are n, `count(batch)` what the losses count in one. Buffers are reused: a
    share lives until the next one is asked for. An error of the thread is raised one step before
    the one that it is about, whose counts are wanted there.
    """

    def __init__(
        self, rows: Store, pieces: Callable[[int], list[Rows]], own: Callable[[int], range],
        count: Callable[[Batch], Tensor], first: int, last: int, pinned: bool = False,
    ) -> None:  # fmt: skip
        self.rows, self.pieces, self.own, self.count = rows, pieces, own, count
        self.steps, self.pinned = range(first, last), pinned
        self._ready: queue.SimpleQueue[tuple[Share, list[Buffer]] | BaseException] = (
            queue.SimpleQueue()
        )
        self._free: queue.SimpleQueue[list[Buffer] | None] = queue.SimpleQueue()
        for _ in range(AHEAD + 2):
            self._free.put([])
        self._thread = threading.Thread(target=self._gather, name="feed", daemon=True)

    def __enter__(self) -> Feed:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:  # fmt: skip
        self._free.put(None)
        self.rows.interrupt()
        self._thread.join()

    def __iter__(self) -> Iterator[tuple[Share, Share | None]]:
        here = self._next() if self.steps else None
        for step in self.steps:
            assert here is not None
            following = self._next() if step + 1 in self.steps else None
            yield here[0], following and following[0]
            self._free.put(here[1])
            here = following

    def _next(self) -> tuple[Share, list[Buffer]]:
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def _gather(self) -> None:
        try:
            for step in self.steps:
                buffers = self._free.get()
                if buffers is None:
                    return
                self._ready.put((self._share(step, buffers), buffers))
        except BaseException as error:
            self._ready.put(error)

    def _share(self, step: int, buffers: list[Buffer]) -> Share:
        pieces = self.pieces(step)
        numbers = self.own(len(pieces))
        own: list[tuple[int, Batch]] = []
        for place, number in enumerate(numbers):
            size = len(pieces[number])
            if place == len(buffers):
                buffers.append(Buffer(self.rows.layout, size, self.pinned))
            if buffers[place].num_rows < size:
                buffers[place] = Buffer(self.rows.layout, size, self.pinned)
            own.append((number, self.rows.gather(pieces[number], buffers[place])))
        return Share(step, pieces, own, {number: self.count(batch) for number, batch in own})
