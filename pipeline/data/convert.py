"""From a source to an entry of the cache, in two passes and bounded memory.

The first pass fits the columns, counts the rows and takes their fingerprint; the second writes
records and lists. Blocks are cut by row numbers alone: neither depends on how files are laid out.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.data import fitting, policy, store
from pipeline.data.arrow import flat, missing, plain
from pipeline.data.columns import Field, Named, Reading, encode
from pipeline.data.fits import Profile
from pipeline.data.places import Located
from pipeline.data.source import Block, Source, opened
from pipeline.data.split import Chooser, chooser
from pipeline.data.store import Fraction
from pipeline.dataspec import Data
from pipeline.errors import DataError

EXAMPLE_ROWS = 5
MANIFEST, EXAMPLE = "manifest.json", "example.arrow"
SPLITS = ("train", "validation")
READ_BYTES = 2**24
Say = Callable[[str], None]


class Conversion:
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
                manifest["crc32"][name] = crc32(path)  # type: ignore[index]
        text = json.dumps(manifest)
        (folder / MANIFEST).write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")

    def _fit(self) -> None:
        """First pass: fields, numbers of rows, fingerprint."""
        faults = policy.Faults()
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
        for _, block, splits in self._rows(policy.Faults()):
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
        self, faults: policy.Faults
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

    def _kept(self, source: Source, block: Block, faults: policy.Faults) -> Any:
        """Numbers of the block's rows that are not dropped."""
        keep = policy.kept(self.data, source, self.fits, block, faults)
        return np.arange(len(block.table)) if keep is None else np.flatnonzero(keep)

    def _kept_of_train(self, block: Block) -> Any:
        return self._kept(self.train, block, policy.Faults())

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


def crc32(path: Path) -> int:
    """CRC-32 of the file, read in parts."""
    found = 0
    with path.open("rb") as file:
        while part := file.read(READ_BYTES):
            found = zlib.crc32(part, found)
    return found
