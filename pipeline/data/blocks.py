"""Blocks of rows, where in their files they stand, and the row groups that files are read by."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.columns import RowName

GroupId = tuple[int, int]
"""Index of a file, and of a row group in it: the least that is read of it at one time.

A row group of Parquet, a record batch of Arrow, or a whole CSV file.
"""


@dataclass(frozen=True)
class FileSlice:
    """Consecutive rows of one file."""

    start_in_block: int
    path: str
    start_in_file: int
    group: GroupId


@dataclass(frozen=True)
class Block:
    """Consecutive rows, in the order of the files."""

    table: pa.Table
    start: int
    """Index of the first row, over all files."""
    slices: list[FileSlice]
    has_several_files: bool
    """Whether a row's name needs its file."""

    def row_name(self, row: int) -> str:
        """Name of a row of the block, for messages: its index, and its file if need be."""
        piece = next(one for one in reversed(self.slices) if one.start_in_block <= row)
        row_in_file = piece.start_in_file + row - piece.start_in_block
        return f"{row_in_file} of {piece.path}" if self.has_several_files else str(self.start + row)

    def row_namer(self, rows: NDArray[np.int64]) -> RowName:
        """Names of some of the block's rows, by their position in `rows`."""
        return lambda position: self.row_name(int(rows[position]))


@dataclass(frozen=True)
class RowGroups:
    """All row groups of a source in order, with how many rows each has."""

    ids: list[GroupId]
    num_rows: list[int]

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Index of each group's first row over all files, then the number of all rows: [G + 1]."""
        return np.concatenate([[0], np.cumsum(self.num_rows, dtype=np.int64)])

    def overlapping(self, rows: range) -> range:
        """Indices of the groups that hold any of the rows."""
        first = int(np.searchsorted(self.starts, rows.start, "right")) - 1
        return range(first, int(np.searchsorted(self.starts, rows.stop, "left")))

    def row_in_file(self, row: int, file: int) -> int:
        """Index in its file of a row that has index `row` over all files."""
        return row - self._file_starts[file]

    @cached_property
    def _file_starts(self) -> dict[int, int]:
        """Index of each file's first row over all files."""
        starts: dict[int, int] = {}
        for (file, _), start in zip(self.ids, self.starts[:-1].tolist(), strict=True):
            starts.setdefault(file, start)
        return starts

    def reads_per_row(self, size: int) -> float:
        """Rows read for each row wanted, if each block of `size` rows is read by itself."""
        total = int(self.starts[-1])
        blocks = (range(start, min(start + size, total)) for start in range(0, total, size))
        read = sum(sum(self.num_rows[i] for i in self.overlapping(rows)) for rows in blocks)
        return read / max(1, total)
