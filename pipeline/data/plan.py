"""Which blocks streamed rows are fetched in, as the first pass over the files finds them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from pipeline.data.fingerprint import digest_rows
from pipeline.data.reader import Block, Group, Groups, Source
from pipeline.data.sampler import Rows
from pipeline.data.split import SplitRows
from pipeline.dataspec import Stream


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

    def add(self, block: Block, splits: Sequence[SplitRows]) -> None:
        """Take in a part of a block, the next one in order."""
        while len(self.counts) <= block.first // self.block_rows:
            self.counts.append(0)
            self.digests.append("")
            self._digest = hashlib.sha256()
        ends = [part.first for part in block.parts[1:]] + [len(block.table)]
        for part, end in zip(block.parts, ends, strict=True):
            self.groups[part.group] = self.groups.get(part.group, 0) + end - part.first
        for rows in splits:
            if rows.split == "train":
                self.counts[-1] += len(rows.table)
                digest_rows(rows.table, self._digest)
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
