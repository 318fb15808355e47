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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.data import store
from pipeline.data.batch import Blocks, Column, Ragged
from pipeline.data.columns import Field, encode
from pipeline.data.fingerprint import digest_rows
from pipeline.data.places import Located
from pipeline.data.sampler import Rows
from pipeline.data.sides import Side, Sides
from pipeline.data.source import Block, Group, Groups, Source, opened
from pipeline.data.store import Buffer, Fraction, Store
from pipeline.dataspec import Stream
from pipeline.errors import DataError

TRIES = 5
FIRST_WAIT_SECONDS = 0.5
LOOK_SECONDS = 0.05


@dataclass
class Plan:
    """What the first pass finds out about the blocks that will be fetched."""

    block_rows: int
    """Rows of the source in each block."""
    window: int
    counts: list[int] = field(default_factory=list)
    """Training rows of each block."""
    digests: list[str] = field(default_factory=list)
    """SHA-256 of these."""
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
            self.digests.append("")
            self._digest = hashlib.sha256()
        ends = [part.first for part in block.parts[1:]] + [len(block.table)]
        for part, end in zip(block.parts, ends, strict=True):
            self.groups[part.group] = self.groups.get(part.group, 0) + end - part.first
        for split, table, _ in sides:
            if split == "train":
                self.counts[-1] += len(table)
                digest_rows(table, self._digest)
        self.digests[-1] = self._digest.hexdigest()

    def to_json(self, first: float | None) -> dict[str, Any]:
        """The plan, and where a split by time begins."""
        return {
            "block_rows": self.block_rows, "window": self.window, "counts": self.counts,
            "digests": self.digests, "first": first,
            "groups": [[*group, rows] for group, rows in self.groups.items()],
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

    @cached_property
    def row_groups(self) -> Groups:
        """What is read at one time."""
        return Groups(list(self.groups), list(self.groups.values()))

    @cached_property
    def reads_per_row(self) -> float:
        """How often the source's average row is read in an epoch."""
        return self.row_groups.reads_per_row(self.block_rows)


class ChangedError(DataError):
    """Files that are not what they were."""


class LeftError(Exception):
    """Nobody waits for the rows any more."""


class Fetcher:
    """Reads a block once more and converts its training rows."""

    def __init__(
        self, found: Located, fields: list[Field], fraction: Fraction, plan: Plan,
        first: float | None,
    ) -> None:  # fmt: skip
        self.found, self.fields, self.fraction, self.plan = found, fields, fraction, plan
        self._stamp, self._first = found.stamp, first
        self._opened: tuple[Source, Sides] | None = None
        self._lock = threading.Lock()

    def into(self, block: int, folder: Path, is_over: threading.Event) -> None:
        """Write the block's rows.

        Raises ChangedError if they are not those of the first pass, and LeftError once `is_over`.
        """
        try:
            self._convert(block, folder, is_over)
        except (DataError, ValueError, pa.ArrowException) as error:
            if changed := self.found.changed(self._stamp):
                more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
                raise ChangedError(
                    f"data.train: {changed[0]}{more} was changed or deleted after it was first "
                    "read: put it back and run the command again, or train on what it holds now "
                    "with --fresh"
                ) from error
            raise

    def _convert(self, block: int, folder: Path, is_over: threading.Event) -> None:
        source, sides = self._source()
        groups, size = self.plan.row_groups, self.plan.block_rows
        rows = range(block * size, min((block + 1) * size, int(groups.starts[-1])))
        writer = store.Writer(folder, self.fields, self.fraction)
        digest, shift = hashlib.sha256(), self.found.data.shift
        for part in source.read(groups, rows):
            if is_over.is_set():
                raise LeftError
            for split, table, named in sides.of(source, part):
                if split == "train":
                    digest_rows(table, digest)
                    encoded = encode(self.fields, table, shift, self.fraction, named)
                    writer.append(encoded, len(table))
        writer.close(to_disk=False)
        if digest.hexdigest() != self.plan.digests[block]:
            raise DataError(
                f"{source.key}: {source.shown}: rows {rows.start} to {rows.stop - 1} are no more "
                "what they were when they were first read"
            )

    def _source(self) -> tuple[Source, Sides]:
        with self._lock:
            if self._opened is None:
                source = opened(self.found)[0]
                made = {field.name: field for field in self.fields}
                self._opened = source, Sides(self.found.data, source, made, self._first)
            return self._opened


class Spool:
    """Blocks of one run on this node: fetched by one worker, read by all, deleted after use."""

    def __init__(self, root: Path, name: str, fetcher: Fetcher) -> None:
        self.root, self.folder, self.fetcher = root, root / f".{name}.blocks", fetcher
        self.is_over = threading.Event()
        self._stores: dict[int, Store] = {}
        self._lock_path = root / f"{name}.lock"
        with self._one_at_a_time():
            self._lock = self._lock_path.open("a")
            if try_lock(self._lock):  # the first one here: what is left is of dead ones
                shutil.rmtree(self.folder, ignore_errors=True)
            fcntl.flock(self._lock, fcntl.LOCK_SH)

    def close(self) -> None:
        """Leave the blocks to the other workers; the last one deletes them."""
        self._stores.clear()
        if not self.root.exists():
            return
        with self._one_at_a_time():
            if try_lock(self._lock):
                shutil.rmtree(self.folder, ignore_errors=True)
                self._lock_path.unlink(missing_ok=True)
            self._lock.close()

    @contextlib.contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        with (self.root / "spool.lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def fetch(self, block: int, wait: bool) -> None:
        """Have the block on the disk; without `wait` leave it to another worker that is at it.

        Raises LeftError once it is over.
        """
        place = self.folder / str(block)
        if place.exists():
            return
        self.folder.mkdir(exist_ok=True)
        with (self.folder / f"{block}.lock").open("a") as file:
            while not try_lock(file):
                if not wait:
                    return
                if self.is_over.wait(LOOK_SECONDS):
                    raise LeftError
            if not place.exists():
                self._fetch(block, place)

    def _fetch(self, block: int, place: Path) -> None:
        temporary = place.with_name(f"{place.name}.{os.getpid()}.{threading.get_ident()}")
        for number in range(TRIES):
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                self.fetcher.into(block, temporary, self.is_over)
                temporary.rename(place)
                return
            except ChangedError:
                raise
            except DataError:  # a network has its bad moments
                if number == TRIES - 1:
                    raise
                if self.is_over.wait(FIRST_WAIT_SECONDS * 2**number):
                    raise LeftError from None
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise DataError(
                    f"cache.folder: {self.root} has no room for the blocks at hand "
                    f"({error.strerror}); set cache.folder to another disk, or a smaller "
                    "data.stream.window"
                ) from None
            finally:
                shutil.rmtree(temporary, ignore_errors=True)

    def store(self, block: int) -> Store:
        """The block's rows, fetched now if nobody has."""
        for _ in range(TRIES):
            if block in self._stores:
                return self._stores[block]
            with contextlib.suppress(FileNotFoundError):  # deleted at this moment: once more
                self.fetch(block, wait=True)
                of, first = self.fetcher, int(self.fetcher.plan.bounds[block])
                place = self.folder / str(block)
                self._stores[block] = store.mapped(place, of.fields, of.fraction, first)
        raise DataError(f"cache.folder: {self.root} was deleted while rows were read from it")

    def keep(self, blocks: Iterable[int]) -> None:
        """Delete all other blocks."""
        kept = set(blocks)
        self._stores = {block: rows for block, rows in self._stores.items() if block in kept}
        for place in self.folder.iterdir() if self.folder.is_dir() else ():
            if place.name.isdigit() and int(place.name) not in kept:
                shutil.rmtree(place, ignore_errors=True)


def try_lock(file: Any) -> bool:
    """Take the lock of an open file, unless another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


class Streamed(Store):
    """Training rows of which only some blocks are on this machine.

    The first few rows always are. Others can be gathered while it is `opened`.
    """

    def __init__(self, head: Store, plan: Plan, fetcher: Fetcher, root: Path, name: str) -> None:
        super().__init__(head.layout, head.records, head.lists)
        self.head, self.plan, self.bounds = head, plan, plan.bounds
        self._fetcher, self._root, self._name = fetcher, root, name
        self._spool: Spool | None = None
        self._expected: list[int] = []
        self._expected_before: list[int] = []
        self._woken = threading.Event()

    def __len__(self) -> int:
        return int(self.bounds[-1])

    @contextlib.contextmanager
    def opened(self, run: str) -> Iterator[Store]:
        """Ready to fetch blocks, which all workers of the run on this node share."""
        name = f"{self._name}-{hashlib.sha256(run.encode()).hexdigest()[:8]}"
        self._spool = spool = Spool(self._root, name, self._fetcher)
        thread = threading.Thread(target=self._fetch_ahead, args=[spool], name="stream")
        thread.start()
        try:
            yield self
        finally:
            self.interrupt()
            thread.join()
            spool.close()
            self._spool, self._expected, self._expected_before = None, [], []

    def interrupt(self) -> None:
        """Whoever waits for rows is to wait no longer."""
        if self._spool is not None:
            self._spool.is_over.set()
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
        while self._woken.wait() and not spool.is_over.is_set():
            self._woken.clear()
            blocks = self._expected
            for block in blocks:
                if spool.is_over.is_set() or self._expected is not blocks:
                    break
                # what fails here fails once more, and is raised, where the block is used
                with contextlib.suppress(DataError, LeftError, OSError, ValueError):
                    spool.fetch(block, wait=False)
        self._woken.clear()

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
            found = self._spool.store(int(block))
            places = np.flatnonzero(blocks == block)
            local = rows[places] - self.bounds[block]
            buffer.records[places] = found.records[local]
            for name, lists in found.lists.items():
                apart[name].append((places, lists.gather(local)))
        joined = {name: _joined(parts, len(rows)) for name, parts in apart.items()}
        return Blocks(buffer.blocks(len(rows)), self.layout.slots, joined)

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
