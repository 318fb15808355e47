"""Missing and invalid values: what the spec says of them, and which rows have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.arrow import missing, unreadable
from pipeline.data.blocks import Block
from pipeline.data.columns import Field, RowName, column_errors
from pipeline.data.columns.base import FIRST_ROWS, in_rows
from pipeline.data.reader import Source
from pipeline.errors import DataError
from pipeline.spec.data import Constant, Data


def with_missing(
    column: Field, data: Data, stored: str, where: str, arrow_type: pa.DataType
) -> Field:
    """The field with what missing values are replaced by, if the spec says so.

    Raises DataError where the spec names this column and it cannot be filled like that.
    """
    policy = data.missing_in(stored)
    is_named = isinstance(data.missing, dict)
    if policy in ("error", "drop"):
        return column
    if isinstance(policy, Constant):
        key = f"data.missing.{stored}.constant"
        with column_errors(key):
            filled = column.fill_constant(policy.constant, arrow_type)
        fault = "can be a constant in columns of single values only"
    elif policy == "category":
        filled = column.fill_category()
        fault = "can be a category of its own in inputs of categories only"
    elif column.is_target and not is_named:  # filled targets count as truth: asked for by name only
        return column
    else:
        filled = column.fill_mean()
        fault = "have a mean in columns of numbers only"
    if filled is None and is_named:
        raise DataError(f"data.missing.{stored}: missing values {fault}; {where} is {column.kind}")
    return filled or column  # a policy for all columns skips those it does not fit


@dataclass
class InvalidRows:
    """Missing and invalid values of each column, counted; the first rows by name."""

    counts: dict[tuple[str, str], int] = field(default_factory=dict)
    first: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def add(self, where: str, what: str, bad: NDArray[np.bool_], row_name: RowName) -> None:
        """Take in the bad rows of some rows."""
        rows = np.flatnonzero(bad)
        if len(rows):
            key = (where, what)
            self.counts[key] = self.counts.get(key, 0) + len(rows)
            names = self.first.setdefault(key, [])
            names += [row_name(int(row)) for row in rows[: FIRST_ROWS - len(names)]]

    @property
    def lines(self) -> list[str]:
        """One for each column and what is wrong in it."""
        return [
            f"{where} has {what} in {in_rows(count)}, first at row "
            f"{', '.join(self.first[where, what])} "
            "(counted from 0)"
            for (where, what), count in self.counts.items()
        ]

    def refuse(self) -> None:
        """Raise DataError with all of them, if there are any."""
        if self.lines:
            advice = (
                "correct the file, or choose in data.missing how missing values are handled: "
                "drop (the row), mean (numbers; targets only by name, {column: mean}), category "
                "(of its own), or {constant: value}"
            )
            raise DataError("\n  ".join([*self.lines, advice]))


def kept_rows(
    data: Data, source: Source, fields: Mapping[str, Field], block: Block, invalid: InvalidRows
) -> NDArray[np.int64]:
    """Indices of the block's rows that are not dropped.

    Missing values that have no policy, and invalid ones, are added to `invalid`.
    """
    keep = np.ones(len(block.table), bool)
    by_stored: dict[str, list[Field]] = {}
    for name, column in fields.items():
        by_stored.setdefault(data.shift.get(name, name), []).append(column)
    bad_rows: list[tuple[str, str, NDArray[np.bool_]]] = []
    for stored in source.wanted:
        values = block.table[stored]
        where = source.where(stored)
        empty = missing(values)
        is_dropped = data.missing_in(stored) == "drop"
        if is_dropped:
            keep &= ~empty
        if stored not in by_stored:  # it only decides where rows belong
            continue
        if not is_dropped and not all(column.is_optional for column in by_stored[stored]):
            bad_rows.append((where, "missing values", empty))
        what = "infinity, or NaN or nothing inside a list,"
        bad_rows.append((where, what, unreadable(values)))
    for where, what, bad in bad_rows:
        invalid.add(where, what, bad & keep, block.row_name)
    return np.flatnonzero(keep)
