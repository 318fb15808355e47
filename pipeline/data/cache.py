"""The rows of a spec, converted once: fields fitted, records written, found at the next start.

An entry is a folder below the cache's own, named after what the rows are made from: the files with
their sizes and times of change, and what the spec makes of them. It is written beside its place and
renamed, by one process of a node; the others wait for it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.data import fitting, store
from pipeline.data.arrow import flat, missing, plain
from pipeline.data.columns import Field, Named, Reading, encode
from pipeline.data.fitting import Profile
from pipeline.data.source import Block, Located, Source, located, opened
from pipeline.data.split import Chooser, chooser
from pipeline.data.store import Fraction, Store
from pipeline.dataspec import Data
from pipeline.errors import DataError, UsageError
from pipeline.spec import Cache

FORMAT = 1
"""Changes with the layout of entries, and with what rows are made of."""
EXAMPLE_ROWS = 5
MANIFEST, EXAMPLE = "manifest.json", "example.arrow"
READ, USED = "read", "used"
"""Empty files whose times tell when the entry was last read through, and opened."""
SPLITS = ("train", "validation")
READ_BYTES = 2**24
TRUSTED_SECONDS = 600.0
"""For so long after one process of the node has read an entry through, others take it as it is."""
Say = Callable[[str], None]


@dataclass(frozen=True, repr=False)
class Rows:
    """The rows of a spec, ready to be gathered."""

    fields: list[Field]
    train: Store
    validation: Store | None
    fingerprint: str
    """SHA-256 over names, types and values of the used columns, whatever the file layout."""
    example: pa.Table
    """The first training rows, raw."""
    facts: dict[str, Any]
    """Where the rows come from, how many were dropped, and the columns' profiles."""


def root(cache: Cache) -> Path:
    """The cache's folder. Raises UsageError if it cannot be made."""
    given = cache.folder or os.environ.get("PIPELINE_CACHE")
    place = Path(given).expanduser() if given else Path("~/.cache/pipeline").expanduser()
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"cache.folder: {place} cannot be made: {error.strerror}; set cache.folder, or "
            "PIPELINE_CACHE, to a folder on this machine's own disk"
        ) from None
    return place.resolve()


def rows(
    data: Data, base: Path, readings: Mapping[str, Reading], fraction: Fraction, cache: Cache,
    *, say: Say = lambda _: None, trusted_seconds: float = 0.0,
) -> Rows:  # fmt: skip
    """The rows that `data` names, from the cache or converted now.

    `say` is told how far a conversion has come. An entry that was read through less than
    `trusted_seconds` ago is not read through again. Raises DataError naming the key, the file and
    the column.
    """
    found = located(data, base)
    folder = root(cache)
    key = _key(found, data, base, readings, fraction)
    entry = folder / key
    with _locked(folder, key):
        if not _is_whole(entry, trusted_seconds, say):
            _build(found, base, readings, fraction, entry, say)
            if _key(located(data, base), data, base, readings, fraction) != key:
                shutil.rmtree(entry)
                raise DataError("data: files changed while they were read; try again")
        (entry / USED).touch()
        made = _opened(entry, fraction)
    _make_room(folder, cache.most_gib * 2**30, key)
    return made


def _key(
    found: Located, data: Data, base: Path, readings: Mapping[str, Reading], fraction: Fraction
) -> str:
    """What an entry's content follows from."""
    paths = [base / Path(path).expanduser() for path in data.tokenizers.values()]
    tokenizers = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()]
    facts = {
        "format": FORMAT, "files": found.stamp, "data": data.model_dump(mode="json"),
        "readings": {name: asdict(reading) for name, reading in readings.items()},
        "tokenizers": tokenizers, "fraction": np.dtype(fraction).name,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


@contextmanager
def _locked(folder: Path, key: str) -> Iterator[None]:
    """One process of this node at a time; others wait."""
    try:
        file = (folder / f"{key}.lock").open("a")
    except OSError as error:
        raise UsageError(f"cache.folder: {folder} cannot be written: {error.strerror}") from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_free(folder: Path, key: str) -> bool:
    """Whether no process reads or writes the entry at this moment."""
    with (folder / f"{key}.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True


def _build(
    found: Located, base: Path, readings: Mapping[str, Reading], fraction: Fraction, entry: Path,
    say: Say,
) -> None:  # fmt: skip
    """Convert the rows into `entry`, or leave nothing. Raises DataError when there is no room."""
    temporary = entry.parent / f".{entry.name}.{os.getpid()}"
    try:
        shutil.rmtree(entry, ignore_errors=True)
        temporary.mkdir()
        _Conversion(found, base, readings, fraction, say).into(temporary)
        temporary.rename(entry)
        (entry / READ).touch()  # just now, for its checksums
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


class _Conversion:
    """Two passes over the source: what its columns are, then the records."""

    def __init__(
        self, found: Located, base: Path, readings: Mapping[str, Reading], fraction: Fraction,
        say: Say,
    ) -> None:  # fmt: skip
        self.found, self.data, self.fraction, self.say = found, found.data, fraction, say
        self.train, self.validation = opened(found)
        self.fits = fitting.fits(self.data, self.train, readings, base)
        self.choose = chooser(self.data, self.train, self._kept_of_train)
        self.digests = {split: hashlib.sha256() for split in SPLITS}
        self.counts = dict.fromkeys(SPLITS, 0)
        self.missing: dict[str, int] = {}
        self.dropped, self.said = 0, time.monotonic()
        self.example: pa.Table | None = None

    def into(self, folder: Path) -> None:
        """Write the entry."""
        self._fit()
        self._refuse_empty()
        fields = [fit.field() for fit in self.fits.values()]
        self._refuse_too_large(fields, folder)
        self._write(fields, folder)
        assert self.example is not None
        with pa.ipc.new_file(folder / EXAMPLE, self.example.schema) as writer:
            writer.write_table(self.example)
        joined = "".join(self.digests[split].hexdigest() for split in SPLITS)
        profiles: dict[str, Profile] = {
            name: {"type": fit.made.arrow_type, "missing": self.missing.get(name, 0)}
            | fit.profile()
            for name, fit in self.fits.items()
        }
        files = self.found.files
        manifest = {
            "fields": [field.to_json() for field in fields],
            "fingerprint": hashlib.sha256(joined.encode()).hexdigest(),
            "facts": {
                "rows": self.counts, "dropped": self.dropped, "files": files[:1000],
                "num_files": len(files), "profile": profiles,
            },
            "sizes": {}, "crc32": {},
        }  # fmt: skip
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                name = str(path.relative_to(folder))
                manifest["sizes"][name] = path.stat().st_size  # type: ignore[index]
                manifest["crc32"][name] = _crc32(path)  # type: ignore[index]
        text = json.dumps(manifest)
        (folder / MANIFEST).write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")

    def _fit(self) -> None:
        """First pass: fields, numbers of rows, fingerprint."""
        faults = fitting.Faults()
        wrong: dict[str, str] = {}
        for source, block, splits in self._rows(faults):
            for split, table, named in splits:
                _digest(table, self.digests[split])
                self.counts[split] += len(table)
                if split != "train":
                    continue
                if self.example is None and len(table):
                    self.example = table.select(source.inputs).slice(0, EXAMPLE_ROWS)
                for name, fit in self.fits.items():
                    column = table[self.data.shift.get(name, name)]
                    self.missing[name] = self.missing.get(name, 0) + int(missing(column).sum())
                    try:
                        if name not in wrong:
                            fit.add(column, named)
                    except DataError as error:
                        wrong[name] = str(error)
            self._tell("read", block.first + len(block.table))
        faults.refuse()
        if wrong:
            raise DataError("\n  ".join(wrong.values()))

    def _write(self, fields: list[Field], folder: Path) -> None:
        """Second pass: records and lists."""
        writers = {
            split: store.Writer(folder / split, fields, self.fraction)
            for split in SPLITS
            if self.counts[split]
        }
        for _, block, splits in self._rows(fitting.Faults()):
            for split, table, named in splits:
                encoded = encode(fields, table, self.data.shift, self.fraction, named)
                if split in writers:
                    writers[split].append(encoded, len(table))
            self._tell("converted", block.first + len(block.table))
        for split, writer in writers.items():
            writer.close()
            if writer.num_rows != self.counts[split]:
                raise DataError("data: files changed while they were read; try again")

    def _rows(
        self, faults: fitting.Faults
    ) -> Iterator[tuple[Source, Block, list[tuple[str, pa.Table, Callable[[int], str]]]]]:
        """Blocks of all sources, each with its part for training and for validation."""
        self.dropped = 0
        for source in filter(None, (self.train, self.validation)):
            for block in source.blocks():
                numbers = self._kept(source, block, faults)
                self.dropped += len(block.table) - len(numbers)
                table = _taken(block.table, numbers)
                held_out = self._held_out(source, table, block.naming(numbers))
                parts = []
                for split, chosen in zip(SPLITS, (~held_out, held_out), strict=True):
                    if chosen.any():
                        rows = np.flatnonzero(chosen)
                        parts.append((split, _taken(table, rows), block.naming(numbers[rows])))
                yield source, block, parts

    def _kept(self, source: Source, block: Block, faults: fitting.Faults) -> Any:
        """Numbers of the block's rows that are not dropped."""
        keep = fitting.kept(self.data, source, self.fits, block, faults)
        return np.arange(len(block.table)) if keep is None else np.flatnonzero(keep)

    def _kept_of_train(self, block: Block) -> Any:
        return self._kept(self.train, block, fitting.Faults())

    def _held_out(self, source: Source, table: pa.Table, named: Named) -> Any:
        if source is self.validation:
            return np.ones(len(table), bool)
        choose: Chooser | None = self.choose
        return np.zeros(len(table), bool) if choose is None else choose(table, named)

    def _refuse_empty(self) -> None:
        num_train, num_validation = (self.counts[split] for split in SPLITS)
        dropped = f" ({self.dropped:,} dropped for missing values)" if self.dropped else ""
        if num_train + num_validation == 0 or (self.validation and not num_train):
            raise DataError(f"data.train: no rows in {self.train.shown}{dropped}")
        if self.validation is not None and not num_validation:
            raise DataError(f"data.validation: no rows in {self.validation.shown}{dropped}")
        if self.choose is not None and not (num_train and num_validation):
            raise DataError(
                f"data.validation: {_shown(self.data)} of {num_train + num_validation} rows leaves "
                f"{num_validation} for validation and {num_train} for training{dropped}"
            )

    def _refuse_too_large(self, fields: list[Field], folder: Path) -> None:
        size = store.Layout.of(fields, self.fraction).record.itemsize * sum(self.counts.values())
        free = shutil.disk_usage(folder).free
        if size > free:
            raise OSError(errno.ENOSPC, f"{size / 2**30:.1f} GiB needed, {free / 2**30:.1f} free")

    def _tell(self, what: str, number: int) -> None:
        if time.monotonic() - self.said > 0.5:
            self.said = time.monotonic()
            self.say(f"rows  {number:,} {what}")


def _taken(table: pa.Table, rows: Any) -> pa.Table:
    """The given rows, in order; the table itself if these are all."""
    return table if len(rows) == len(table) else table.take(rows)


def _shown(data: Data) -> str:
    split = data.validation
    return str(split if isinstance(split, float) else split.model_dump(exclude_none=True))  # type: ignore[union-attr]


def _digest(table: pa.Table, digest: Any) -> None:
    """Take names, types and values of the rows into the hash, however they are chunked."""
    for name, column in zip(table.column_names, table.columns, strict=True):
        array = plain(column)
        values, offsets = flat(array)
        digest.update(json.dumps([name, _type_name(array.type), len(array), len(values)]).encode())
        digest.update(np.packbits(missing(array)).tobytes())
        digest.update(np.packbits(missing(values)).tobytes())
        if offsets is not None:
            digest.update(np.diff(offsets).tobytes())
        for part in _bytes_of(values.drop_null()):
            digest.update(part)


def _type_name(kind: pa.DataType) -> str:
    """The type without what only files differ in: names of list items, sizes of offsets, units."""
    types = pa.types
    if types.is_fixed_size_list(kind):
        return f"{kind.list_size} x {_type_name(kind.value_type)}"
    if types.is_list(kind) or types.is_large_list(kind):
        return f"list of {_type_name(kind.value_type)}"
    for name, tests in {
        "text": (types.is_string, types.is_large_string),
        "bytes": (types.is_binary, types.is_large_binary),
        "time": (types.is_timestamp,), "date": (types.is_date,),
    }.items():  # fmt: skip
        if any(test(kind) for test in tests):
            return name
    return str(kind)


def _bytes_of(values: Any) -> Iterator[Any]:
    """The bytes of values that are all there."""
    types = pa.types
    if types.is_null(values.type):
        return
    if types.is_boolean(values.type):
        values = values.cast(pa.uint8())
    if types.is_timestamp(values.type):
        values = values.cast(pa.timestamp("us"), safe=False)
    if types.is_date(values.type):
        values = values.cast(pa.date32())
    is_text = types.is_string(values.type) or types.is_large_string(values.type)
    if is_text or types.is_binary(values.type) or types.is_large_binary(values.type):
        whole = values.cast(pa.large_binary())
        ends = np.frombuffer(whole.buffers()[1], np.int64)[whole.offset :][: len(whole) + 1]
        yield np.diff(ends).tobytes()
        if whole.buffers()[2] is not None:
            yield memoryview(whole.buffers()[2])[ends[0] : ends[-1]]
        return
    if values.null_count:
        values = values.fill_null(
            pa.scalar(0).cast(values.type)
            if not types.is_temporal(values.type)
            else pa.scalar(0, pa.int64()).cast(values.type, safe=False)
        )
    width = values.type.bit_width // 8
    yield memoryview(values.buffers()[1])[
        values.offset * width : (values.offset + len(values)) * width
    ]


def _crc32(path: Path) -> int:
    found = 0
    with path.open("rb") as file:
        while part := file.read(READ_BYTES):
            found = zlib.crc32(part, found)
    return found


def _manifest(entry: Path) -> dict[str, Any] | None:
    """The entry's manifest if it is whole."""
    try:
        digest, _, text = (entry / MANIFEST).read_text().partition("\n")
        if hashlib.sha256(text.encode()).hexdigest() != digest:
            return None
        found: dict[str, Any] = json.loads(text)
    except (OSError, ValueError):
        return None
    return found


def _is_whole(entry: Path, trusted_seconds: float, say: Say) -> bool:
    """Whether every byte of the entry is as it was written; reading it also warms it up."""
    manifest = _manifest(entry)
    if manifest is None:
        if entry.exists():
            say(f"cache {entry.name} is damaged: converting again")
        return False
    stamp = entry / READ
    is_trusted = stamp.exists() and time.time() - stamp.stat().st_mtime < trusted_seconds
    for name, size in manifest["sizes"].items():
        path = entry / name
        if not path.exists() or path.stat().st_size != size or (
            not is_trusted and _crc32(path) != manifest["crc32"][name]
        ):  # fmt: skip
            say(f"cache {entry.name}/{name} is damaged: converting again")
            return False
    if not is_trusted:
        stamp.touch()
    return True


def _opened(entry: Path, fraction: Fraction) -> Rows:
    manifest = _manifest(entry)
    assert manifest is not None
    fields = [Field.from_json(field) for field in manifest["fields"]]
    example = pa.ipc.open_file(entry / EXAMPLE).read_all()
    train = store.mapped(entry / "train", fields, fraction)
    validation = None
    if (entry / "validation").exists():
        validation = store.mapped(entry / "validation", fields, fraction)
    return Rows(fields, train, validation, manifest["fingerprint"], example, manifest["facts"])


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
    found = []
    for place in folder.iterdir() if folder.is_dir() else ():
        if not place.is_dir() or place.name.startswith("."):
            continue
        size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
        facts = (_manifest(place) or {}).get("facts", {})
        used = place / USED
        found.append(
            Entry(
                place.name, size, (used if used.exists() else place).stat().st_mtime,
                facts.get("files", []), sum(facts.get("rows", {}).values()),
            )
        )  # fmt: skip
    return sorted(found, key=lambda entry: -entry.used)


def clear(folder: Path, names: list[str] | None = None) -> int:
    """Delete entries (all unless named), and return the bytes they had.

    Runs that have one open keep it until they end.
    """
    freed = 0
    _sweep(folder)
    for entry in entries(folder):
        if (names is None or entry.name in names) and _is_free(folder, entry.name):
            shutil.rmtree(folder / entry.name, ignore_errors=True)
            freed += entry.size
    return freed


def _sweep(folder: Path) -> None:
    """Delete what conversions left whose process died."""
    for left in folder.glob(".*.*"):
        if left.is_dir() and _is_free(folder, left.name.split(".")[1]):
            shutil.rmtree(left, ignore_errors=True)


def _make_room(folder: Path, most: float, keep: str) -> None:
    """Delete what was not used for longest until the rest is within `most` bytes."""
    _sweep(folder)
    found = entries(folder)
    total = sum(entry.size for entry in found)
    for entry in reversed(found):
        if total > most and entry.name != keep:
            total -= clear(folder, [entry.name])
