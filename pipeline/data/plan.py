"""Which blocks streamed rows are fetched in, as the first pass over the files finds them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from pydantic import BaseModel, ConfigDict

from pipeline.data.blocks import Block, GroupId, RowGroups
from pipeline.data.cuts import Cut, Strata
from pipeline.data.fingerprint import digest_rows
from pipeline.data.reader import Source
from pipeline.data.sampler import Rows
from pipeline.data.split import SplitRows
from pipeline.spec.data import Stream


class PlanRecord(BaseModel):
    """A plan as it is stored."""

    model_config = ConfigDict(frozen=True)

    block_rows: int
    window: int
    counts: list[int]
    digests: list[str]
    cuts: dict[str, int | float | Strata | None]
    """Where each split by time begins, and the strata."""
    groups: list[tuple[int, int, int]]
    """File, row group and rows."""


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
    groups: dict[GroupId, int] = field(default_factory=dict)
    """Rows of each row group of the source."""

    @classmethod
    def of(cls, stream: Stream, source: Source) -> Plan:
        """A plan of no blocks yet."""
        return cls(stream.block_rows or 16 * source.block_rows, stream.window)

    def add(self, block: Block, splits: Sequence[SplitRows]) -> None:
        """Take in a part of a block, the next one in order."""
        while len(self.counts) <= block.start // self.block_rows:
            self.counts.append(0)
            self.digests.append("")
            self._digest = hashlib.sha256()
        ends = [piece.start_in_block for piece in block.slices[1:]] + [len(block.table)]
        for piece, end in zip(block.slices, ends, strict=True):
            self.groups[piece.group] = self.groups.get(piece.group, 0) + end - piece.start_in_block
        for rows in splits:
            if rows.split == "train":
                self.counts[-1] += len(rows.table)
                digest_rows(rows.table, self._digest)
        self.digests[-1] = self._digest.hexdigest()

    def record(self, cuts: dict[str, Cut]) -> PlanRecord:
        """The plan as it is stored, with the cuts of its splits."""
        return PlanRecord(
            block_rows=self.block_rows,
            window=self.window,
            counts=self.counts,
            digests=self.digests,
            cuts=cuts,
            groups=[(*group, rows) for group, rows in self.groups.items()],
        )

    @classmethod
    def from_record(cls, record: PlanRecord) -> Plan:
        """The plan that was stored."""
        groups = {(file, number): rows for file, number, rows in record.groups}
        return cls(record.block_rows, record.window, record.counts, record.digests, groups)

    @property
    def bounds(self) -> Rows:
        """First training row of each block, and the number of all: int64 [blocks + 1]."""
        return np.concatenate([[0], np.cumsum(self.counts, dtype=np.int64)])

    @cached_property
    def row_groups(self) -> RowGroups:
        """What is read at one time."""
        return RowGroups(list(self.groups), list(self.groups.values()))

    @cached_property
    def reads_per_row(self) -> float:
        """How often the source's average row is read in an epoch."""
        return self.row_groups.reads_per_row(self.block_rows)
