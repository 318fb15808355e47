"""From a source to an entry of the cache, in two passes and bounded memory.

The first pass fits the columns, counts the rows and takes their fingerprint; the second writes
records and lists. Blocks are cut by row numbers alone: neither depends on how files are laid out.
Of rows that are streamed the second writes the first few, and those for validation.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from pipeline.data.arrow import missing
from pipeline.data.bind import bind, fit, unfitted_fields
from pipeline.data.blocks import Block
from pipeline.data.columns import Field, FloatType, Profile, Reading, column_errors, encode
from pipeline.data.dataset import Layout, Writer
from pipeline.data.fingerprint import crc32, digest_rows
from pipeline.data.locate import DataFiles
from pipeline.data.missing import InvalidRows
from pipeline.data.origins import OriginWriter
from pipeline.data.plan import Plan, PlanRecord
from pipeline.data.reader import Source, open_sources
from pipeline.data.split import SPLITS, SplitRows, Splitter
from pipeline.errors import DataError
from pipeline.files.sealed import Sealed
from pipeline.spec.split import HELD_OUT, Split

EXAMPLE_ROWS = 5
HEAD_ROWS = 64
"""Rows that are kept of those that are streamed: enough to try a model and its losses on."""
MANIFEST, EXAMPLE, ORIGINS = "manifest.json", "example.arrow", "origins.npz"
Report = Callable[[str], None]


class Facts(BaseModel):
    """What people are told about the rows."""

    model_config = ConfigDict(frozen=True)

    rows: dict[str, int]
    """How many rows each split has."""
    digests: dict[str, str]
    """SHA-256 of each split that has rows, over names, types and values of its used columns."""
    dropped: int
    files: list[str]
    """The first thousand."""
    num_files: int
    profile: dict[str, Profile]
    """Plain numbers about each column."""
    index_columns: list[str]
    """Columns of pandas' index, which are not read."""


class Stored(BaseModel):
    """A file of an entry."""

    model_config = ConfigDict(frozen=True)

    bytes: int
    crc32: int


class Manifest(Sealed):
    """What an entry of the cache is."""

    fields: list[dict[str, Any]]
    """The columns, as `Field.to_json` gives them."""
    fingerprint: str
    facts: Facts
    files: dict[str, Stored]
    stream: PlanRecord | None
    """The blocks of rows that are streamed."""


class Conversion:
    """Two passes over the source: what its columns are, then the records."""

    def __init__(
        self,
        located: DataFiles,
        base: Path,
        readings: Mapping[str, Reading],
        float_dtype: FloatType,
        report: Report,
    ) -> None:
        self.located = located
        self.data = located.data
        self.float_dtype = float_dtype
        self.report = report
        self.sources = open_sources(located)
        self.train = self.sources["train"]
        self.statistics = bind(self.data, self.train, readings, base)
        self.splitter = Splitter(self.data, self.train, unfitted_fields(self.statistics))
        stream = self.data.stream
        self.plan = Plan.of(stream, self.train) if stream else None
        splits = [split for split in SPLITS if split != "test" or self.data.test is not None]
        self.digests = {split: hashlib.sha256() for split in splits}
        self.counts = dict.fromkeys(splits, 0)
        self.missing: dict[str, int] = {}
        self.dropped = 0
        self._last_report = time.monotonic()
        self.example: pa.Table | None = None
        self.origins = OriginWriter()

    def write_to(self, folder: Path) -> None:
        """Write the entry."""
        self._observe()
        self._refuse_empty()
        fields = [
            fit(self.data, name, statistics, self.train)
            for name, statistics in self.statistics.items()
        ]
        self._refuse_too_large(fields, folder)
        self._write(fields, folder)
        assert self.example is not None
        with pa.ipc.new_file(folder / EXAMPLE, self.example.schema) as writer:
            writer.write_table(self.example)
        if self.counts["validation"]:
            self.origins.write(folder / ORIGINS)
        digests = [digest.hexdigest() for digest in self.digests.values()]
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        manifest = Manifest(
            fields=[field.to_json() for field in fields],
            fingerprint=hashlib.sha256("".join(digests).encode()).hexdigest(),
            facts=self._facts(),
            files={
                str(path.relative_to(folder)): Stored(bytes=path.stat().st_size, crc32=crc32(path))
                for path in paths
            },
            stream=self.plan.record(self.splitter.cuts) if self.plan else None,
        )
        (folder / MANIFEST).write_bytes(manifest.to_bytes())

    def _facts(self) -> Facts:
        files = self.located.files
        profile: dict[str, Profile] = {
            name: {"type": one.field.arrow_type, "missing": self.missing.get(name, 0)}
            | one.profile()
            for name, one in self.statistics.items()
        }
        return Facts(
            rows=self.counts,
            digests={
                split: digest.hexdigest()
                for split, digest in self.digests.items()
                if self.counts[split]
            },
            dropped=self.dropped,
            files=files[:1000],
            num_files=len(files),
            profile=profile,
            index_columns=self.train.passed,
        )

    def _observe(self) -> None:
        """First pass: column statistics, numbers of rows, fingerprint."""
        invalid = InvalidRows()
        faults: dict[str, str] = {}
        for source, block in self._blocks():
            splits = self.splitter.split(source, block, invalid)
            self.dropped += len(block.table) - sum(len(rows.table) for rows in splits)
            for rows in splits:
                digest_rows(rows.table, self.digests[rows.split])
                self.counts[rows.split] += len(rows.table)
                if rows.split == "train":
                    self._observe_columns(source, rows, faults)
            if self.plan is not None and source is self.train:
                self.plan.add(block, splits)
            self._report("read", block.start + len(block.table))
        invalid.refuse()
        if faults:
            raise DataError("\n  ".join(faults.values()))

    def _observe_columns(self, source: Source, rows: SplitRows, faults: dict[str, str]) -> None:
        if self.example is None:
            read = [*source.inputs, *([self.data.exposure] if self.data.exposure else [])]
            self.example = rows.table.select(read).slice(0, EXAMPLE_ROWS)
        for name, statistics in self.statistics.items():
            stored = self.data.shift.get(name, name)
            column = rows.table[stored]
            self.missing[name] = self.missing.get(name, 0) + int(missing(column).sum())
            if name in faults:
                continue
            try:
                with column_errors(source.where(stored), rows.row_name):
                    statistics.observe(column)
            except DataError as error:
                faults[name] = str(error)

    def _write(self, fields: list[Field], folder: Path) -> None:
        """Second pass: records and lists."""
        most = {split: count for split, count in self.counts.items() if count}
        if self.plan is not None:
            most["train"] = min(HEAD_ROWS, most["train"])
        writers = {split: Writer(folder / split, fields, self.float_dtype) for split in most}
        for source in self.sources.values():
            self._copy(source, fields, writers, most)
        for split, writer in writers.items():
            writer.close()
            if writer.num_rows != most[split]:
                raise DataError("data: files changed while they were read; try again")

    def _copy(
        self,
        source: Source,
        fields: list[Field],
        writers: Mapping[str, Writer],
        most: Mapping[str, int],
    ) -> None:
        """Append the source's rows, up to so `most` of each split."""
        is_short = self.plan is not None and not self.splitter.choosers and source is self.train
        for block in source.blocks(self._every(source)):
            for rows in self.splitter.split(source, block):
                split, table = rows.split, rows.table
                if split == "train" and self.plan is not None:
                    table = table.slice(0, most[split] - writers[split].num_rows)
                if split in writers and len(table):
                    encoded = encode(
                        fields, table, self.data.shift, self.float_dtype, rows.row_name
                    )
                    writers[split].append(encoded, len(table))
                if split == "validation":
                    self.origins.add(block, rows.positions)
            self._report("converted", block.start + len(block.table))
            if is_short and writers["train"].num_rows == most["train"]:
                return

    def _blocks(self) -> Iterator[tuple[Source, Block]]:
        for source in self.sources.values():
            for block in source.blocks(self._every(source)):
                yield source, block

    def _every(self, source: Source) -> int | None:
        return self.plan.block_rows if self.plan and source is self.train else None

    def _refuse_empty(self) -> None:
        dropped = f" ({self.dropped:,} dropped for missing values)" if self.dropped else ""
        drawn = [split for split in HELD_OUT if split in self.splitter.choosers]
        in_source = {split: self.counts[split] for split in self.sources}
        in_source["train"] += sum(self.counts[split] for split in drawn)
        for split, source in self.sources.items():
            if not in_source[split]:
                raise DataError(f"data.{split}: no rows in {source.shown}{dropped}")
        num_train = self.counts["train"]
        for split in drawn:
            if not (self.counts[split] and num_train):
                asked = self.data.held_out(split)
                shown = asked.shown if isinstance(asked, Split) else asked
                raise DataError(
                    f"data.{split}: {shown} of {in_source['train']} rows leaves "
                    f"{self.counts[split]} for {split} and {num_train} for training{dropped}; rows "
                    "are drawn one by one, so that few rows are split unevenly"
                )

    def _refuse_too_large(self, fields: list[Field], folder: Path) -> None:
        num_rows = sum(self.counts.values()) - (self.counts["train"] if self.plan else 0)
        size = Layout.of(fields, self.float_dtype).record.itemsize * num_rows
        free = shutil.disk_usage(folder).free
        if size > free:
            raise OSError(errno.ENOSPC, f"{size / 2**30:.1f} GiB needed, {free / 2**30:.1f} free")

    def _report(self, what: str, num_rows: int) -> None:
        if time.monotonic() - self._last_report > 0.5:
            self._last_report = time.monotonic()
            self.report(f"rows  {num_rows:,} {what}")
