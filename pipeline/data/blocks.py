"""Blocks of rows, where in their files they are from, and what is read of a file at one time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Group = tuple[int, int]
"""Number of a file, and of what is read of it at one time: a row group or a record batch."""


@dataclass(frozen=True)
class Part:
    """Rows that follow each other in one file."""

    first: int
    """Number of the first of them in its block."""
    path: str
    row: int
    """Number of the first of them in its file."""
    group: Group


@dataclass(frozen=True)
class Block:
    """Some rows in a row, as they stand in their files."""

    table: pa.Table
    first: int
    """Number of the first row, over all files."""
    parts: list[Part]
    has_files: bool
    """Whether rows are named by their files, of which there are several."""

    def named(self, row: int) -> str:
        """The row by its number, and its file where there are several."""
        part = next(p for p in reversed(self.parts) if p.first <= row)
        row_in_file = part.row + row - part.first
        return f"{row_in_file} of {part.path}" if self.has_files else str(self.first + row)

    def naming(self, rows: Any) -> Callable[[int], str]:
        """How the given rows of the block, counted from 0, are called."""
        return lambda index: self.named(int(rows[index]))


@dataclass(frozen=True)
class Groups:
    """Everything that is read at one time, in order, with how many rows it has."""

    groups: list[Group]
    num_rows: list[int]

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Number of the first row of each, over all files, and of all rows at the end."""
        return np.concatenate([[0], np.cumsum(self.num_rows, dtype=np.int64)])

    def holding(self, rows: range) -> range:
        """Numbers of the row groups that hold the rows."""
        first = int(np.searchsorted(self.starts, rows.start, "right")) - 1
        return range(first, int(np.searchsorted(self.starts, rows.stop, "left")))

    def row_in_file(self, row: int, file: int) -> int:
        """Number of the row in its file."""
        return row - self._files[file]

    @cached_property
    def _files(self) -> dict[int, int]:
        """Number of the first row of each file."""
        starts = reversed(list(zip(self.groups, self.starts.tolist(), strict=False)))
        return {file: start for (file, _), start in starts}

    def reads_per_row(self, size: int) -> float:
        """How often the average row is read when every `size` rows are read by themselves."""
        total = int(self.starts[-1])
        blocks = (range(start, min(start + size, total)) for start in range(0, total, size))
        read = sum(sum(self.num_rows[i] for i in self.holding(rows)) for rows in blocks)
        return read / max(1, total)
