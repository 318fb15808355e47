"""Each step's rows on their way to the step: gathered by a thread that is some steps ahead."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType

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

    @property
    def num_rows(self) -> int:
        """Rows of the global batch."""
        return sum(map(len, self.pieces))


class Feed:
    """Shares of the steps from `first` to `last`, in order.

    `pieces(step)` are the step's micro-batches, `own(n)` the numbers of those that this worker
    computes when there are n. Buffers are reused: a share lives until the next one is asked for.
    Errors of the thread are raised where its share would have come.
    """

    def __init__(
        self, rows: Store, pieces: Callable[[int], list[Rows]], own: Callable[[int], range],
        first: int, last: int, pinned: bool = False,
    ) -> None:  # fmt: skip
        self.rows, self.pieces, self.own = rows, pieces, own
        self.steps, self.pinned = range(first, last), pinned
        self._ready: queue.SimpleQueue[tuple[Share, list[Buffer]] | BaseException] = (
            queue.SimpleQueue()
        )
        self._free: queue.SimpleQueue[list[Buffer] | None] = queue.SimpleQueue()
        for _ in range(AHEAD + 1):
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
        self._thread.join()

    def __iter__(self) -> Iterator[Share]:
        for _ in self.steps:
            item = self._ready.get()
            if isinstance(item, BaseException):
                raise item
            share, buffers = item
            yield share
            self._free.put(buffers)

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
        numbers = [number for number in self.own(len(pieces)) if len(pieces[number])]
        own: list[tuple[int, Batch]] = []
        for place, number in enumerate(numbers):
            size = len(pieces[number])
            if place == len(buffers):
                buffers.append(Buffer(self.rows.layout, size, self.pinned))
            if buffers[place].num_rows < size:
                buffers[place] = Buffer(self.rows.layout, size, self.pinned)
            own.append((number, self.rows.gather(pieces[number], buffers[place])))
        return Share(step, pieces, own)
