"""Blocks of streamed rows on this machine: read once more, and shared by the workers of a node."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock, Timeout

from pipeline.data.columns import Field, FloatType, encode
from pipeline.data.cuts import Cut
from pipeline.data.dataset import Dataset, Writer, open_dataset
from pipeline.data.fingerprint import digest_rows
from pipeline.data.locate import DataFiles
from pipeline.data.plan import Plan
from pipeline.data.reader import Source, open_sources
from pipeline.data.split import Splitter
from pipeline.errors import DataError

TRIES = 5
FIRST_WAIT_SECONDS = 0.5
LOOK_SECONDS = 0.05


class ChangedError(DataError):
    """Files that are not what they were."""


class StreamClosedError(Exception):
    """The stream was closed while rows were fetched."""


class Fetcher:
    """Reads a block once more and converts its training rows."""

    def __init__(
        self,
        located: DataFiles,
        fields: list[Field],
        float_dtype: FloatType,
        plan: Plan,
        cuts: Mapping[str, Cut],
    ) -> None:
        self.located = located
        self.fields = fields
        self.float_dtype = float_dtype
        self.plan = plan
        self._stamp, self._cuts = located.stamp(), cuts
        self._opened: tuple[Source, Splitter] | None = None
        self._lock = threading.Lock()

    def convert_to(self, block: int, folder: Path, is_closed: threading.Event) -> None:
        """Write the block's rows.

        Raises ChangedError if they are not those of the first pass, and StreamClosedError once
        `is_closed` is set.
        """
        try:
            self._convert(block, folder, is_closed)
        except (DataError, ValueError, pa.ArrowException) as error:
            if changed := self.located.changed(self._stamp):
                more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
                raise ChangedError(
                    f"data.train: {changed[0]}{more} was changed or deleted after it was first "
                    "read: put it back and run the command again, or train on what it holds now "
                    "with --fresh"
                ) from error
            raise

    def _convert(self, block: int, folder: Path, is_closed: threading.Event) -> None:
        source, splitter = self._source()
        groups, size = self.plan.row_groups, self.plan.block_rows
        asked = range(block * size, min((block + 1) * size, int(groups.starts[-1])))
        writer = Writer(folder, self.fields, self.float_dtype)
        digest = hashlib.sha256()
        shift = self.located.data.shift
        for part in source.read(groups, asked):
            if is_closed.is_set():
                raise StreamClosedError
            for rows in splitter.split(source, part):
                if rows.split == "train":
                    digest_rows(rows.table, digest)
                    encoded = encode(
                        self.fields, rows.table, shift, self.float_dtype, rows.row_name
                    )
                    writer.append(encoded, len(rows.table))
        writer.close(to_disk=False)
        if digest.hexdigest() != self.plan.digests[block]:
            raise DataError(
                f"{source.key}: {source.shown}: rows {asked.start} to {asked.stop - 1} are not "
                "what they were when they were first read"
            )

    def _source(self) -> tuple[Source, Splitter]:
        with self._lock:
            if self._opened is None:
                source = open_sources(self.located)["train"]
                fields = {field.name: field for field in self.fields}
                self._opened = source, Splitter(self.located.data, source, fields, self._cuts)
            return self._opened


class Spool:
    """Blocks of one run on this node: fetched by one worker, read by all, deleted after use."""

    def __init__(self, root: Path, name: str, fetcher: Fetcher) -> None:
        self.root = root
        self.folder = _blocks_folder(root, name)
        self.fetcher = fetcher
        self.is_closed = threading.Event()
        self._datasets: dict[int, Dataset] = {}
        self._lock_path = _lock_path(root, name)
        with _one_at_a_time(root):
            self._lock = self._lock_path.open("a")
            if _try_lock(self._lock):  # the first one here: what is left is of dead ones
                shutil.rmtree(self.folder, ignore_errors=True)
            fcntl.flock(self._lock, fcntl.LOCK_SH)

    def close(self) -> None:
        """Leave the blocks to the other workers; the last one deletes them."""
        self._datasets.clear()
        if not self.root.exists():
            return
        with _one_at_a_time(self.root):
            if _try_lock(self._lock):
                shutil.rmtree(self.folder, ignore_errors=True)
                self._lock_path.unlink(missing_ok=True)
            self._lock.close()

    def fetch(self, block: int, wait: bool) -> None:
        """Bring the block to the disk; without `wait`, leave it to a worker that has begun.

        Raises StreamClosedError once it is closed.
        """
        path = self.folder / str(block)
        if path.exists():
            return
        self.folder.mkdir(exist_ok=True)
        lock = FileLock(self.folder / f"{block}.lock", timeout=0)
        while True:
            try:
                lock.acquire()
                break
            except Timeout:
                if not wait:
                    return
                if self.is_closed.wait(LOOK_SECONDS):
                    raise StreamClosedError from None
        try:
            if not path.exists():
                self._fetch(block, path)
        finally:
            lock.release()

    def _fetch(self, block: int, path: Path) -> None:
        temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
        for attempt in range(TRIES):
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                self.fetcher.convert_to(block, temporary, self.is_closed)
                temporary.rename(path)
                return
            except ChangedError:
                raise
            except DataError:  # a network has its bad moments
                if attempt == TRIES - 1:
                    raise
                if self.is_closed.wait(FIRST_WAIT_SECONDS * 2**attempt):
                    raise StreamClosedError from None
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise DataError(
                    f"cache.folder: {self.root} has no room for the blocks in use "
                    f"({error.strerror}); set cache.folder to another disk, or a smaller "
                    "data.stream.window"
                ) from None
            finally:
                shutil.rmtree(temporary, ignore_errors=True)

    def dataset(self, block: int) -> Dataset:
        """The block's rows, fetched now if nobody has."""
        for _ in range(TRIES):
            if block in self._datasets:
                return self._datasets[block]
            with contextlib.suppress(FileNotFoundError):  # deleted at this moment: once more
                self.fetch(block, wait=True)
                fetcher = self.fetcher
                first = int(self.fetcher.plan.bounds[block])
                path = self.folder / str(block)
                self._datasets[block] = open_dataset(
                    path, fetcher.fields, fetcher.float_dtype, first
                )
        raise DataError(f"cache.folder: {self.root} was deleted while rows were read from it")

    def keep(self, blocks: Iterable[int]) -> None:
        """Delete all other blocks."""
        wanted = set(blocks)
        self._datasets = {block: rows for block, rows in self._datasets.items() if block in wanted}
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path.name.isdigit() and int(path.name) not in wanted:
                shutil.rmtree(path, ignore_errors=True)


def delete_orphans(root: Path) -> None:
    """Delete the blocks of runs that no process of this node works on any more."""
    for folder in root.glob(_blocks_folder(root, "*").name):
        path = _lock_path(root, folder.name.removeprefix(".").removesuffix(".blocks"))
        with _one_at_a_time(root), path.open("a") as lock:
            if _try_lock(lock):
                shutil.rmtree(folder, ignore_errors=True)
                path.unlink(missing_ok=True)


def _blocks_folder(root: Path, name: str) -> Path:
    return root / f".{name}.blocks"


def _lock_path(root: Path, name: str) -> Path:
    """The file that each worker of a run keeps locked, shared, while it needs the blocks."""
    return root / f"{name}.lock"


def _one_at_a_time(root: Path) -> FileLock:
    """Held while a run's lock is taken or given back, or its file is deleted."""
    return FileLock(root / "spool.lock")


def _try_lock(file: Any) -> bool:
    """Take the lock of an open file, unless another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
