"""Which rows are trained on, which are for validation, and which are dropped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.data import policy
from pipeline.data.columns import Field, Named
from pipeline.data.sampler import Rows
from pipeline.data.source import Block, Source
from pipeline.data.split import Chooser, chooser, first_held_out
from pipeline.dataspec import Data

SPLITS = ("train", "validation")
Side = tuple[str, pa.Table, Named]
"""A split, rows of it, and what they are called."""


class Sides:
    """Sorts the rows of each block, by their own content.

    `first` is where a split by time begins; found by a pass over the source unless it is known.
    """

    def __init__(
        self, data: Data, source: Source, made: Mapping[str, Field], first: float | None = None
    ) -> None:
        self.data, self.made = data, made
        if first is None:
            first = first_held_out(data, source, lambda block: self._kept(source, block))
        self.first = first
        self.choose: Chooser | None = chooser(data, source, first)

    def of(self, source: Source, block: Block, faults: policy.Faults | None = None) -> list[Side]:
        """The block's rows for training and for validation, where it has any.

        Missing values that have no policy, and values that are none, are added to `faults`.
        """
        numbers = self._kept(source, block, faults)
        table, named = _taken(block.table, numbers), block.naming(numbers)
        if source.key == "data.validation":
            held_out = np.ones(len(table), bool)
        elif self.choose is None:
            held_out = np.zeros(len(table), bool)
        else:
            held_out = self.choose(table, named)
        found = []
        for split, chosen in zip(SPLITS, (~held_out, held_out), strict=True):
            if chosen.any():
                rows = np.flatnonzero(chosen)
                found.append((split, _taken(table, rows), block.naming(numbers[rows])))
        return found

    def _kept(self, source: Source, block: Block, faults: policy.Faults | None = None) -> Rows:
        """Numbers of the block's rows that are not dropped."""
        keep = policy.kept(self.data, source, self.made, block, faults or policy.Faults())
        return np.arange(len(block.table)) if keep is None else np.flatnonzero(keep)


def _taken(table: pa.Table, rows: Rows) -> pa.Table:
    """The given rows, in order; the table itself if these are all."""
    if len(rows) == len(table):
        return table
    columns = [_whole(column) if _is_nested(column.type) else column for column in table.columns]
    return pa.table(columns, schema=table.schema).take(rows)


def _is_nested(kind: pa.DataType) -> bool:
    """Whether these are fixed-size lists of fixed-size lists."""
    fixed = pa.types.is_fixed_size_list
    return bool(fixed(kind) and fixed(kind.value_type))


def _whole(column: pa.ChunkedArray) -> Any:
    """The column in memory of its own: of slices of nested lists Arrow 25 takes wrong rows."""
    half = len(column) // 2
    return pa.concat_arrays([*column.slice(0, half).chunks, *column.slice(half).chunks])
