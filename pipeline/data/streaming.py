"""Training rows that are fetched while training: those of a few blocks at a time."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.data.batch import Column, PackedBatch, Ragged
from pipeline.data.dataset import Buffer, Dataset
from pipeline.data.plan import Plan
from pipeline.data.sampler import Rows
from pipeline.data.spool import Fetcher, Spool, StreamClosedError
from pipeline.errors import DataError


class Streamed(Dataset):
    """Training rows of which only some blocks are on this machine.

    The first rows, the `head`, always are; `records` and `lists` hold no others. The rest is
    fetched while the data set is `opened`.
    """

    def __init__(
        self, head: Dataset, plan: Plan, fetcher: Fetcher, cache_folder: Path, entry: str
    ) -> None:
        super().__init__(head.layout, head.records, head.lists)
        self.head = head
        self.plan = plan
        self.bounds = plan.bounds
        self._fetcher = fetcher
        self._cache_folder, self._entry = cache_folder, entry
        self._spool: Spool | None = None
        self._expected: list[int] = []
        self._expected_before: list[int] = []
        self._woken = threading.Event()

    def __len__(self) -> int:
        return int(self.bounds[-1])

    @contextlib.contextmanager
    def opened(self, run_id: str) -> Iterator[Dataset]:
        """Ready to fetch blocks, which workers of this node share if they give one `run_id`."""
        name = f"{self._entry}-{hashlib.sha256(run_id.encode()).hexdigest()[:8]}"
        self._spool = spool = Spool(self._cache_folder, name, self._fetcher)
        thread = threading.Thread(target=self._fetch_ahead, args=[spool], name="stream")
        thread.start()
        try:
            yield self
        finally:
            self.interrupt()
            thread.join()
            spool.close()
            self._spool = None
            self._expected = []
            self._expected_before = []

    def interrupt(self) -> None:
        """Threads that wait for rows raise StreamClosedError."""
        if self._spool is not None:
            self._spool.is_closed.set()
            self._woken.set()

    def expect(self, blocks: list[int]) -> None:
        """Fetch these blocks, which will be asked for in this order, ahead of their use.

        Those of the call before stay, as another worker may be a step behind; all others go.
        """
        if blocks != self._expected and self._spool is not None:
            self._expected_before, self._expected = self._expected, blocks
            self._spool.keep([*self._expected_before, *blocks])
            self._woken.set()

    def _fetch_ahead(self, spool: Spool) -> None:
        while self._woken.wait() and not spool.is_closed.is_set():
            self._woken.clear()
            blocks = self._expected
            for block in blocks:
                if spool.is_closed.is_set() or self._expected is not blocks:
                    break
                # what fails here fails once more, and is raised, where the block is used
                with contextlib.suppress(DataError, StreamClosedError, OSError, ValueError):
                    spool.fetch(block, wait=False)
        self._woken.clear()

    def gather(self, rows: Rows | Tensor, buffer: Buffer | None = None) -> PackedBatch:
        """The given rows; with a `buffer` they are views of it, valid until it is used again."""
        rows = np.asarray(rows)
        if not len(rows) or rows.max() < len(self.head):
            return self.head.gather(rows, buffer)
        assert self._spool is not None, "rows are fetched while the dataset is opened"
        buffer = buffer or Buffer(self.layout, len(rows))
        block_of_row = np.searchsorted(self.bounds, rows, "right") - 1
        lists_by_column: dict[str, list[tuple[Rows, Column]]] = {name: [] for name in self.lists}
        for block in np.unique(block_of_row):
            dataset = self._spool.dataset(int(block))
            indices = np.flatnonzero(block_of_row == block)
            local = rows[indices] - self.bounds[block]
            buffer.records[indices] = dataset.records[local]
            for name, lists in dataset.lists.items():
                lists_by_column[name].append((indices, lists.gather(local)))
        joined = {name: _join(parts, len(rows)) for name, parts in lists_by_column.items()}
        return PackedBatch(buffer.matrices(len(rows)), self.layout.slots, joined)

    def parts(self, names: list[str], size: int = 2**16) -> Iterable[PackedBatch]:
        """The named columns of the head; other rows are seen only where they are used."""
        return self.head.parts(names, size)


def _join(parts: list[tuple[Rows, Column]], num_rows: int) -> Column:
    """One column of the parts' rows, each at its index."""
    first = parts[0][1]
    if isinstance(first, Tensor):
        whole = first.new_empty(num_rows, *first.shape[1:])
        for indices, part in parts:
            assert isinstance(part, Tensor)
            whole[torch.from_numpy(indices)] = part
        return whole
    width = max(part.values.shape[1] for _, part in parts if isinstance(part, Ragged))
    values = first.values.new_zeros(num_rows, width)
    lengths = first.lengths.new_zeros(num_rows)
    for indices, part in parts:
        assert isinstance(part, Ragged)
        at = torch.from_numpy(indices)
        values[at, : part.values.shape[1]] = part.values
        lengths[at] = part.lengths
    return Ragged(values, lengths)
