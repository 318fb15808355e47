"""From a source to an entry of the cache, in two passes and bounded memory.

The first pass fits the columns, counts the rows and takes their fingerprint; the second writes
records and lists. Blocks are cut by row numbers alone: neither depends on how files are laid out.
Of rows that are streamed the second writes the first few, and those for validation.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.data import fitting, policy, store
from pipeline.data.arrow import missing
from pipeline.data.columns import Field, Reading, encode
from pipeline.data.fingerprint import crc32, digest_rows
from pipeline.data.fits import Profile
from pipeline.data.places import Located
from pipeline.data.sides import SPLITS, Sides
from pipeline.data.source import Block, Source, opened
from pipeline.data.store import Fraction
from pipeline.data.stream import Plan
from pipeline.dataspec import Data
from pipeline.errors import DataError

EXAMPLE_ROWS = 5
HEAD_ROWS = 64
"""Rows that are kept of those that are streamed: enough to try a model and its losses on."""
MANIFEST, EXAMPLE = "manifest.json", "example.arrow"
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
        self.sides = Sides(self.data, self.train, fitting.raw(self.fits))
        stream = self.data.stream
        self.plan = Plan.of(stream, self.train) if stream else None
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
        manifest: dict[str, Any] = {
            "fields": [field.to_json() for field in fields],
            "fingerprint": hashlib.sha256(joined.encode()).hexdigest(),
            "facts": {
                "rows": self.counts, "dropped": self.dropped, "files": files[:1000],
                "num_files": len(files), "profile": profiles, "passed": self.train.passed,
            },
            "sizes": {}, "crc32": {},
            "stream": self.plan and self.plan.to_json(self.sides.first),
        }  # fmt: skip
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                name = str(path.relative_to(folder))
                manifest["sizes"][name] = path.stat().st_size
                manifest["crc32"][name] = crc32(path)
        text = json.dumps(manifest)
        (folder / MANIFEST).write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")

    def _fit(self) -> None:
        """First pass: fields, numbers of rows, fingerprint."""
        faults = policy.Faults()
        wrong: dict[str, str] = {}
        for source, block in self._blocks():
            sides = self.sides.of(source, block, faults)
            self.dropped += len(block.table) - sum(len(table) for _, table, _ in sides)
            for split, table, named in sides:
                digest_rows(table, self.digests[split])
                self.counts[split] += len(table)
                if split != "train":
                    continue
                if self.example is None:
                    self.example = table.select(source.inputs).slice(0, EXAMPLE_ROWS)
                for name, fit in self.fits.items():
                    column = table[self.data.shift.get(name, name)]
                    self.missing[name] = self.missing.get(name, 0) + int(missing(column).sum())
                    try:
                        if name not in wrong:
                            fit.add(column, named)
                    except DataError as error:
                        wrong[name] = str(error)
            if self.plan is not None and source is self.train:
                self.plan.add(block, sides)
            self._tell("read", block.first + len(block.table))
        faults.refuse()
        if wrong:
            raise DataError("\n  ".join(wrong.values()))

    def _write(self, fields: list[Field], folder: Path) -> None:
        """Second pass: records and lists."""
        most = {split: self.counts[split] for split in SPLITS if self.counts[split]}
        if self.plan is not None:
            most["train"] = min(HEAD_ROWS, most["train"])
        writers = {split: store.Writer(folder / split, fields, self.fraction) for split in most}
        for source in filter(None, (self.train, self.validation)):
            self._copy(source, fields, writers, most)
        for split, writer in writers.items():
            writer.close()
            if writer.num_rows != most[split]:
                raise DataError("data: files changed while they were read; try again")

    def _copy(
        self, source: Source, fields: list[Field], writers: Mapping[str, store.Writer],
        most: Mapping[str, int],
    ) -> None:  # fmt: skip
        """Append the source's rows, up to so `most` of each split."""
        is_short = self.plan is not None and self.sides.choose is None and source is self.train
        for block in source.blocks(self._every(source)):
            for split, table, named in self.sides.of(source, block):
                if split == "train" and self.plan is not None:
                    table = table.slice(0, most[split] - writers[split].num_rows)
                if split in writers and len(table):
                    encoded = encode(fields, table, self.data.shift, self.fraction, named)
                    writers[split].append(encoded, len(table))
            self._tell("converted", block.first + len(block.table))
            if is_short and writers["train"].num_rows == most["train"]:
                return

    def _blocks(self) -> Iterator[tuple[Source, Block]]:
        for source in filter(None, (self.train, self.validation)):
            for block in source.blocks(self._every(source)):
                yield source, block

    def _every(self, source: Source) -> int | None:
        return self.plan.block_rows if self.plan and source is self.train else None

    def _refuse_empty(self) -> None:
        num_train, num_validation = (self.counts[split] for split in SPLITS)
        dropped = f" ({self.dropped:,} dropped for missing values)" if self.dropped else ""
        if num_train + num_validation == 0 or (self.validation and not num_train):
            raise DataError(f"data.train: no rows in {self.train.shown}{dropped}")
        if self.validation is not None and not num_validation:
            raise DataError(f"data.validation: no rows in {self.validation.shown}{dropped}")
        if self.sides.choose is not None and not (num_train and num_validation):
            raise DataError(
                f"data.validation: {_shown(self.data)} of {num_train + num_validation} rows leaves "
                f"{num_validation} for validation and {num_train} for training{dropped}"
            )

    def _refuse_too_large(self, fields: list[Field], folder: Path) -> None:
        num_rows = sum(self.counts.values()) - (self.counts["train"] if self.plan else 0)
        size = store.Layout.of(fields, self.fraction).record.itemsize * num_rows
        free = shutil.disk_usage(folder).free
        if size > free:
            raise OSError(errno.ENOSPC, f"{size / 2**30:.1f} GiB needed, {free / 2**30:.1f} free")

    def _tell(self, what: str, number: int) -> None:
        if time.monotonic() - self.said > 0.5:
            self.said = time.monotonic()
            self.say(f"rows  {number:,} {what}")


def _shown(data: Data) -> str:
    split = data.validation
    return str(split if isinstance(split, float) else split.model_dump(exclude_none=True))  # type: ignore[union-attr]
