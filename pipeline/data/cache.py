"""The rows of a spec, converted once: fields fitted, records written, found at the next start.

An entry is a folder below the cache's own, named after what the rows are made from: the files with
their sizes and modification times, and what the spec makes of them. One process of a node writes
it, to a temporary folder that is then renamed; the others wait for it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout

from pipeline.data.columns import Field, FloatType, Reading, from_json
from pipeline.data.convert import EXAMPLE, MANIFEST, ORIGINS, Conversion, Facts, Manifest, Report
from pipeline.data.dataset import Dataset, open_dataset
from pipeline.data.fingerprint import crc32
from pipeline.data.locate import DataFiles, locate
from pipeline.data.origins import Origins
from pipeline.data.plan import Plan
from pipeline.data.spool import Fetcher, delete_orphans
from pipeline.data.streaming import Streamed
from pipeline.errors import DataError, UsageError
from pipeline.spec import Cache
from pipeline.spec.data import Data
from pipeline.spec.split import HELD_OUT

FORMAT = 9
"""Part of every key: to be increased when the layout of entries or the conversion changes."""
VERIFIED, USED = "read", "used"
"""Empty files in an entry; their times tell when it was last verified, and opened."""
TRUSTED_SECONDS = 600.0
"""How long other processes of the node trust that an entry was verified."""
TEMPORARY = re.compile(r"\.(?P<key>[0-9a-f]{32})\.\d+")
"""Name of the folder in which a process builds an entry."""


@dataclass(frozen=True, repr=False)
class ConvertedRows:
    """The rows of a spec, ready to be gathered."""

    fields: list[Field]
    train: Dataset
    validation: Dataset | None
    test: Dataset | None
    fingerprint: str
    """SHA-256 over names, types and values of the used columns, whatever the file layout."""
    example: pa.Table
    """The first training rows, raw."""
    facts: Facts
    origins: Origins | None
    """Where the validation rows stand in their files."""


def make_folder(cache: Cache) -> Path:
    """The cache's folder. Created if need be; raises UsageError if it cannot be."""
    setting = cache.folder or os.environ.get("PIPELINE_CACHE")
    folder = Path(setting).expanduser() if setting else Path("~/.cache/pipeline").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"cache.folder: {folder} cannot be created: {error.strerror}; set cache.folder, or "
            "PIPELINE_CACHE, to a folder on this machine's own disk"
        ) from None
    return folder.resolve()


def load_or_convert(
    data: Data,
    base: Path,
    readings: Mapping[str, Reading],
    float_dtype: FloatType,
    cache: Cache,
    *,
    report: Report = lambda _: None,
    trusted_seconds: float = 0.0,
) -> ConvertedRows:
    """The rows that `data` names, from the cache or converted now.

    Relative paths start at `base`. `report` gets a line now and then while rows are converted, and
    one if an entry is damaged. An entry that was verified less than `trusted_seconds` ago is not
    verified again. Raises DataError naming the key, the file and the column.
    """
    files = locate(data, base)
    folder = make_folder(cache)
    key = _key(files, data, base, readings, float_dtype)
    entry = folder / key
    with _lock_entry(folder, key):
        if not _is_intact(entry, trusted_seconds, report):
            _build_entry(files, base, readings, float_dtype, entry, report)
            if _key(locate(data, base), data, base, readings, float_dtype) != key:
                shutil.rmtree(entry)
                raise DataError("data: files changed while they were read; try again")
        (entry / USED).touch()
        converted = _open_entry(entry, files, float_dtype)
    _make_room(folder, cache.most_gib * 2**30, key)
    return converted


def _key(
    located: DataFiles,
    data: Data,
    base: Path,
    readings: Mapping[str, Reading],
    float_dtype: FloatType,
) -> str:
    """Name of an entry: a hash of all that determines its content."""
    paths = [base / Path(path).expanduser() for path in data.tokenizers.values()]
    tokenizers = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()]
    facts = {
        "format": FORMAT,
        "files": located.stamp(),
        "data": data.model_dump(mode="json"),
        "readings": {name: asdict(reading) for name, reading in readings.items()},
        "tokenizers": tokenizers,
        "float_dtype": np.dtype(float_dtype).name,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


@contextmanager
def _lock_entry(folder: Path, key: str) -> Iterator[None]:
    """One process of this node at a time; others wait."""
    try:
        lock = _lock(folder, key)
        lock.acquire()
    except OSError as error:
        text = f"cache.folder: {folder} cannot be written: {error.strerror}"
        raise UsageError(text) from None
    try:
        yield
    finally:
        lock.release()


def _lock(folder: Path, key: str) -> FileLock:
    """The entry's lock, whose file stays when the entry goes: others may wait for it."""
    (folder / ".locks").mkdir(exist_ok=True)
    return FileLock(folder / ".locks" / f"{key}.lock")


def _is_free(folder: Path, key: str) -> bool:
    """Whether no process builds, verifies or opens the entry; one that has it open may run on."""
    try:
        with _lock(folder, key).acquire(timeout=0):
            return True
    except Timeout:
        return False


def _build_entry(
    located: DataFiles,
    base: Path,
    readings: Mapping[str, Reading],
    float_dtype: FloatType,
    entry: Path,
    report: Report,
) -> None:
    """Convert the rows into `entry`, or leave nothing. Raises DataError when there is no room."""
    temporary = entry.parent / f".{entry.name}.{os.getpid()}"
    try:
        shutil.rmtree(entry, ignore_errors=True)
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that had the same id
        temporary.mkdir()
        Conversion(located, base, readings, float_dtype, report).write_to(temporary)
        temporary.rename(entry)
        (entry / VERIFIED).touch()  # just now, for its checksums
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise UsageError(
                f"cache.folder: {entry.parent} cannot be written: {error.strerror}"
            ) from error
        raise DataError(
            f"cache.folder: {entry.parent} has no room for the converted rows ({error.strerror}); "
            "make room, `pipeline cache clear`, or set cache.folder to another disk"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _manifest(entry: Path) -> Manifest | None:
    """The entry's manifest if it is intact."""
    try:
        return Manifest.read(entry / MANIFEST)
    except (OSError, ValueError):
        return None


def _is_intact(entry: Path, trusted_seconds: float, report: Report) -> bool:
    """Whether every byte of the entry is as it was written."""
    manifest = _manifest(entry)
    if manifest is None:
        if entry.exists():
            report(f"cache {entry.name} is damaged: converting again")
        return False
    stamp = entry / VERIFIED
    is_trusted = stamp.exists() and time.time() - stamp.stat().st_mtime < trusted_seconds
    for name, stored in manifest.files.items():
        path = entry / name
        if (
            not path.exists()
            or path.stat().st_size != stored.bytes
            or (not is_trusted and crc32(path) != stored.crc32)
        ):
            report(f"cache {entry.name}/{name} is damaged: converting again")
            return False
    if not is_trusted:
        stamp.touch()
    return True


def _open_entry(entry: Path, located: DataFiles, float_dtype: FloatType) -> ConvertedRows:
    manifest = _manifest(entry)
    assert manifest is not None
    fields = [from_json(field) for field in manifest.fields]
    example = pa.ipc.open_file(entry / EXAMPLE).read_all()
    train = open_dataset(entry / "train", fields, float_dtype)
    if manifest.stream:
        plan = Plan.from_record(manifest.stream)
        fetcher = Fetcher(located, fields, float_dtype, plan, manifest.stream.cuts)
        train = Streamed(train, plan, fetcher, entry.parent, entry.name)
    held_out = {
        split: open_dataset(entry / split, fields, float_dtype)
        for split in HELD_OUT
        if (entry / split).exists()
    }
    return ConvertedRows(
        fields,
        train,
        held_out.get("validation"),
        held_out.get("test"),
        manifest.fingerprint,
        example,
        manifest.facts,
        Origins.read(entry / ORIGINS) if "validation" in held_out else None,
    )


@dataclass(frozen=True)
class Entry:
    """One converted data set on the disk."""

    name: str
    size: int
    """Bytes."""
    used: float
    """When a command last opened it, in seconds since 1970."""
    files: list[str]
    num_rows: int


def entries(folder: Path) -> list[Entry]:
    """What the cache holds, the one used last first."""
    held = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and not path.name.startswith("."):
            with contextlib.suppress(FileNotFoundError):  # deleted at this moment
                held.append(_describe_entry(path))
    return sorted(held, key=lambda entry: -entry.used)


def _describe_entry(path: Path) -> Entry:
    manifest = _manifest(path)
    used = path / USED
    return Entry(
        path.name,
        sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        (used if used.exists() else path).stat().st_mtime,
        manifest.facts.files if manifest else [],
        sum(manifest.facts.rows.values()) if manifest else 0,
    )


def clear(folder: Path, names: list[str] | None = None) -> int:
    """Delete entries (all unless named), and return the bytes they had.

    Runs that have one open keep it until they end.
    """
    _delete_orphans(folder)
    held = entries(folder)
    return sum(_delete(folder, one) for one in held if names is None or one.name in names)


def _delete(folder: Path, entry: Entry) -> int:
    """Delete the entry unless a process is at it, and return the bytes that this freed."""
    if not _is_free(folder, entry.name):
        return 0
    shutil.rmtree(folder / entry.name, ignore_errors=True)
    return entry.size


def _delete_orphans(folder: Path) -> None:
    """Delete what processes left that died: half-built entries and blocks of streamed rows."""
    for path in folder.iterdir() if folder.is_dir() else ():
        match = TEMPORARY.fullmatch(path.name)
        if match and _is_free(folder, match["key"]):
            shutil.rmtree(path, ignore_errors=True)
    delete_orphans(folder)


def _make_room(folder: Path, max_bytes: float, keep: str) -> None:
    """Delete the least recently used entries, but `keep`, until the rest has `max_bytes`."""
    _delete_orphans(folder)
    held = entries(folder)
    total = sum(entry.size for entry in held)
    for entry in reversed(held):
        if total > max_bytes and entry.name != keep:
            total -= _delete(folder, entry)
