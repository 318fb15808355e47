"""Training rows that are fetched while training: those of a few blocks at a time.

The workers of a node share what one of them has fetched, in files that live as long as they do.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.data import store
from pipeline.data.batch import Blocks, Column, Ragged
from pipeline.data.columns import Field, encode
from pipeline.data.fingerprint import digest_rows
from pipeline.data.order import Rows
from pipeline.data.sides import Side, Sides
from pipeline.data.source import Block, Group, Groups, Source
from pipeline.data.store import Buffer, Fraction, Store
from pipeline.dataspec import Data, Stream
from pipeline.errors import DataError

TRIES = 5
FIRST_WAIT_SECONDS = 0.5


@dataclass
class Plan:
    """What the first pass finds out about the blocks that will be fetched."""

    block_rows: int
    """Rows of the source in each block."""
    window: int
    counts: list[int] = field(default_factory=list)
    """Training rows of each block."""
    digests: list[Any] = field(default_factory=list)
    """SHA-256 of these, taken while the block is read and in hexadecimal afterwards."""
    groups: dict[Group, int] = field(default_factory=dict)
    """Rows of each row group of the source."""

    @classmethod
    def of(cls, stream: Stream, source: Source) -> Plan:
        """A plan of no blocks yet."""
        return cls(stream.block_rows or 16 * source.block_rows, stream.window)

    def add(self, block: Block, sides: Sequence[Side]) -> None:
        """Take in a part of a block, the next one in order."""
        while len(self.counts) <= block.first // self.block_rows:
            self.counts.append(0)
            self.digests.append(hashlib.sha256())
        ends = [part.first for part in block.parts[1:]] + [len(block.table)]
        for part, end in zip(block.parts, ends, strict=True):
            self.groups[part.group] = self.groups.get(part.group, 0) + end - part.first
        for split, table, _ in sides:
            if split == "train":
                self.counts[-1] += len(table)
                digest_rows(table, self.digests[-1])

    def to_json(self, first: float | None) -> dict[str, Any]:
        """The plan, and where a split by time begins."""
        return {
            "block_rows": self.block_rows, "window": self.window, "counts": self.counts,
            "digests": [digest.hexdigest() for digest in self.digests],
            "groups": [[*group, rows] for group, rows in self.groups.items()], "first": first,
        }  # fmt: skip

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Plan:
        """The plan that `to_json` gave."""
        groups = {(file, number): rows for file, number, rows in found["groups"]}
        return cls(found["block_rows"], found["window"], found["counts"], found["digests"], groups)

    @property
    def bounds(self) -> Rows:
        """First training row of each block, and the number of all: int64 [blocks + 1]."""
        return np.concatenate([[0], np.cumsum(self.counts, dtype=np.int64)])

    @property
    def reads_per_row(self) -> float:
        """How often the source's average row is read in an epoch."""
        return self.row_groups.reads_per_row(self.block_rows)

    @property
    def row_groups(self) -> Groups:
        """What is read at one time."""
        return Groups(list(self.groups), list(self.groups.values()))


class Fetcher:
    """Reads a block once more and converts its training rows."""

    def __init__(
        self, data: Data, opened: Callable[[], Source], fields: list[Field], fraction: Fraction,
        plan: Plan, first: float | None,
    ) -> None:  # fmt: skip
        self.data, self.fields, self.fraction, self.plan = data, fields, fraction, plan
        self._opened, self._first = opened, first
        self._source: Source | None = None
        self._lock = threading.Lock()

    def into(self, block: int, folder: Path) -> None:
        """Write the block's rows. Raises DataError if they are not those of the first pass."""
        with self._lock:
            source = self._source = self._source or self._opened()
        made = {field.name: field for field in self.fields}
        sides = Sides(self.data, source, made, self._first)
        groups, size = self.plan.row_groups, self.plan.block_rows
        rows = range(block * size, min((block + 1) * size, int(groups.starts[-1])))
        writer = store.Writer(folder, self.fields, self.fraction)
        digest, where = hashlib.sha256(), ""
        for part in source.read(groups, rows):
            where = where or part.named(0)
            for split, table, named in sides.of(source, part):
                if split == "train":
                    digest_rows(table, digest)
                    encoded = encode(self.fields, table, self.data.shift, self.fraction, named)
                    writer.append(encoded, len(table))
        writer.close(to_disk=False)
        if digest.hexdigest() != self.plan.digests[block]:
            raise ChangedError(
                f"{source.key}: {source.shown}: the {len(rows)} rows from row {where} are no more "
                "what they were when the data was first read"
            )


class ChangedError(DataError):
    """Files that are not what they were."""


class Spool:
    """Blocks of one run on this node: fetched by one worker, read by all, deleted after use."""

    def __init__(self, root: Path, name: str, fetch: Callable[[int, Path], None]) -> None:
        self.folder, self.fetch = root / f".{name}.blocks", fetch
        self._stores: dict[int, Store] = {}
        with (root / "spool.lock").open("a") as one_at_a_time:
            fcntl.flock(one_at_a_time, fcntl.LOCK_EX)
            self._held = (root / f"{name}.lock").open("a")
            with contextlib.suppress(OSError):  # the first one here: what is left is of dead ones
                fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(self.folder, ignore_errors=True)
            fcntl.flock(self._held, fcntl.LOCK_SH)

    def close(self) -> None:
        """Leave the blocks to the other workers; the last one deletes them."""
        self._stores.clear()
        with contextlib.suppress(OSError):
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(self.folder, ignore_errors=True)
        self._held.close()

    def ensure(self, block: int, wait: bool) -> None:
        """Fetch the block unless it is there; without `wait` not while another worker does."""
        place = self.folder / str(block)
        if place.exists():
            return
        self.folder.mkdir(exist_ok=True)
        with (self.folder / f"{block}.lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                return
            if not place.exists():
                self._fetch(block, place)

    def _fetch(self, block: int, place: Path) -> None:
        temporary = place.with_name(f"{place.name}.{os.getpid()}.{threading.get_ident()}")
        for number in range(TRIES):
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                self.fetch(block, temporary)
                temporary.rename(place)
                return
            except ChangedError:
                raise
            except DataError:  # a network has its bad moments
                if number == TRIES - 1:
                    raise
                time.sleep(FIRST_WAIT_SECONDS * 2**number)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise DataError(
                    f"cache.folder: {self.folder.parent} has no room for the blocks at hand "
                    f"({error.strerror}); set cache.folder to another disk, or a smaller "
                    "data.stream.window"
                ) from None
            finally:
                shutil.rmtree(temporary, ignore_errors=True)

    def store(self, block: int, opened: Callable[[Path], Store]) -> Store:
        """The block's rows, fetched now if nobody has."""
        while block not in self._stores:
            with contextlib.suppress(FileNotFoundError):  # deleted at this moment: once more
                self.ensure(block, wait=True)
                self._stores[block] = opened(self.folder / str(block))
        return self._stores[block]

    def keep(self, blocks: Iterable[int]) -> None:
        """Delete all other blocks."""
        kept = set(blocks)
        self._stores = {block: rows for block, rows in self._stores.items() if block in kept}
        for place in self.folder.iterdir() if self.folder.is_dir() else ():
            if place.name.isdigit() and int(place.name) not in kept:
                shutil.rmtree(place, ignore_errors=True)


class Streamed(Store):
    """Training rows of which only some blocks are on this machine.

    The first few rows always are. Others can be gathered while it is `opened`.
    """

    def __init__(self, head: Store, plan: Plan, fetcher: Fetcher, root: Path, name: str) -> None:
        super().__init__(head.layout, head.records, head.lists)
        self.head, self.plan, self.bounds = head, plan, plan.bounds
        self._fetcher, self._root, self._name = fetcher, root, name
        self._spool: Spool | None = None
        self._coming: list[int] = []
        self._before: list[int] = []
        self._woken = threading.Event()
        self._is_over = False

    def __len__(self) -> int:
        return int(self.bounds[-1])

    @contextlib.contextmanager
    def opened(self, run: str) -> Iterator[Store]:
        """Ready to fetch blocks, which all workers of the run on this node share."""
        name = f"{self._name}-{hashlib.sha256(run.encode()).hexdigest()[:8]}"
        self._spool = Spool(self._root, name, self._fetcher.into)
        self._is_over = False
        thread = threading.Thread(target=self._fetch_ahead, name="stream", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._is_over = True
            self._woken.set()
            thread.join()
            self._spool.close()
            self._spool = None

    def expect(self, blocks: list[int]) -> None:
        """Fetch these blocks, which will be asked for in this order, ahead of their use.

        Those of the call before stay, as another worker may be a step behind; all others go.
        """
        if blocks != self._coming and self._spool is not None:
            self._before, self._coming = self._coming, blocks
            self._spool.keep([*self._before, *blocks])
            self._woken.set()

    def _fetch_ahead(self) -> None:
        while self._woken.wait():
            self._woken.clear()
            blocks = self._coming
            for block in blocks:
                if self._is_over or self._coming is not blocks:
                    break
                with contextlib.suppress(DataError, OSError):  # raised where the block is used
                    assert self._spool is not None
                    self._spool.ensure(block, wait=False)
            if self._is_over:
                return

    def gather(self, rows: Rows | Tensor, buffer: Buffer | None = None) -> Blocks:
        """The given rows, in `buffer` if there is one; its next use ends the life of the batch."""
        rows = np.asarray(rows)
        if not len(rows) or rows.max() < len(self.head):
            return self.head.gather(rows, buffer)
        assert self._spool is not None, "rows are fetched while the store is opened"
        buffer = buffer or Buffer(self.layout, len(rows))
        blocks = np.searchsorted(self.bounds, rows, "right") - 1
        apart: dict[str, list[tuple[Rows, Column]]] = {name: [] for name in self.lists}
        for block in np.unique(blocks):
            found = self._spool.store(int(block), self._open)
            places = np.flatnonzero(blocks == block)
            local = rows[places] - self.bounds[block]
            buffer.records[places] = found.records[local]
            for name, lists in found.lists.items():
                apart[name].append((places, lists.gather(local)))
        joined = {name: _joined(parts, len(rows)) for name, parts in apart.items()}
        return Blocks(buffer.blocks(len(rows)), self.layout.slots, joined)

    def _open(self, folder: Path) -> Store:
        return store.mapped(folder, self._fetcher.fields, self._fetcher.fraction)

    def parts(self, names: list[str], size: int = 2**16) -> Iterable[Blocks]:
        """The named columns of the rows that are at hand."""
        return self.head.parts(names, size)


def _joined(parts: list[tuple[Rows, Column]], num_rows: int) -> Column:
    """One column of the parts' rows, each at its place."""
    first = parts[0][1]
    if isinstance(first, Tensor):
        whole = first.new_empty(num_rows, *first.shape[1:])
        for places, part in parts:
            assert isinstance(part, Tensor)
            whole[torch.from_numpy(places)] = part
        return whole
    width = max(part.values.shape[1] for _, part in parts if isinstance(part, Ragged))
    values, lengths = first.values.new_zeros(num_rows, width), first.lengths.new_zeros(num_rows)
    for places, part in parts:
        assert isinstance(part, Ragged)
        at = torch.from_numpy(places)
        values[at, : part.values.shape[1]] = part.values
        lengths[at] = part.lengths
    return Ragged(values, lengths)
