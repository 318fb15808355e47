"""Values that are missing or are none: what the spec says of them, and which rows are at fault."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data import columns
from pipeline.data.arrow import missing, unreadable
from pipeline.data.columns import Field, Named
from pipeline.data.fits import MEAN
from pipeline.data.source import Block, Source
from pipeline.dataspec import Constant, Data
from pipeline.errors import DataError


def with_policy(
    made: Field, data: Data, column: str, where: str, kind: pa.DataType | None = None
) -> Field:
    """The field with what stands in the place of its missing values, if the spec says so."""
    policy = data.missing_in(column)
    is_named = isinstance(data.missing, dict)
    if policy in ("error", "drop"):
        return made
    if policy == "category":
        if made.kind == "category" and made.is_input:
            return replace(made, has_missing=True)
        fault = "can be a category of its own in inputs of categories only"
    elif policy == "mean":
        if made.kind == "number" and made.is_target and not is_named:
            return made  # what is filled in would count as truth: that is asked for by name
        if made.kind == "number" and not made.is_weight:
            return replace(made, fill=MEAN)
        fault = "have a mean in columns of numbers only"
    elif isinstance(policy, Constant) and made.kind in columns.SINGLE:
        return replace(made, fill=_constant(policy.constant, made, column, kind))
    else:
        fault = "can be a constant in columns of single values only"
    if is_named:
        raise DataError(f"data.missing.{column}: missing values {fault}; {where} is {made.kind}")
    return made  # of a policy for all columns it takes those that it can; the rest are errors


def _constant(value: float | str, made: Field, column: str, kind: pa.DataType | None) -> Any:
    """The constant as the column holds its values. Raises DataError for one that it cannot hold."""
    where = f"data.missing.{column}.constant"
    if made.kind == "number":
        if isinstance(value, str):
            raise DataError(f"{where}: {value!r} is no number")
        return value
    held = kind.value_type if kind is not None and pa.types.is_dictionary(kind) else kind
    if held is not None and pa.types.is_boolean(held):
        if value not in ("true", "false"):
            raise DataError(f"{where}: {value!r} is not 'true' or 'false', as the column holds")
        return value == "true"
    given = int(value) if isinstance(value, float) and value.is_integer() else value
    try:
        made_of = pa.scalar(given, held).as_py()
    except (pa.ArrowException, OverflowError, TypeError):
        made_of = None
    if made_of != given:
        raise DataError(f"{where}: {given!r} is no {held}, as the column holds")
    return given


@dataclass
class Faults:
    """Bad rows of each column, counted; the first of them by name."""

    counts: dict[tuple[str, str], int] = field(default_factory=dict)
    first: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def add(self, where: str, what: str, bad: NDArray[np.bool_], named: Named) -> None:
        """Take in the bad rows of some rows."""
        found = np.flatnonzero(bad)
        if len(found):
            key = (where, what)
            self.counts[key] = self.counts.get(key, 0) + len(found)
            kept = self.first.setdefault(key, [])
            kept += [named(int(row)) for row in found[: columns.FIRST_ROWS - len(kept)]]

    @property
    def lines(self) -> list[str]:
        """One for each column and what is wrong in it."""
        return [
            f"{where}: {count} {what}, first at row {', '.join(self.first[where, what])} "
            "(counted from 0)"
            for (where, what), count in self.counts.items()
        ]

    def refuse(self) -> None:
        """Raise DataError with all of them, if there are any."""
        if self.lines:
            raise DataError(
                "\n  ".join(self.lines)
                + "\n  mend the file, or say in data.missing what becomes of missing values: drop "
                "(the row), mean (numbers; targets only by name, {column: mean}), category (of its "
                "own), or {constant: value}"
            )


def kept(
    data: Data, source: Source, made: Mapping[str, Field], block: Block, faults: Faults
) -> Any:  # fmt: skip
    """True for each row of the block that is not dropped, or None for all of them.

    Missing values that have no policy, and values that are none, are added to `faults`.
    """
    keep = np.ones(len(block.table), bool)
    stored_in: dict[str, list[Field]] = {}
    for name, one in made.items():
        stored_in.setdefault(data.shift.get(name, name), []).append(one)
    odd: list[tuple[str, str, NDArray[np.bool_]]] = []
    for column in source.wanted:
        values, where = block.table[column], source.where(column)
        empty = missing(values)
        is_dropped = data.missing_in(column) == "drop"
        if is_dropped:
            keep &= ~empty
        if column not in stored_in:  # it only tells where rows belong
            continue
        if not is_dropped and not all(_has_value(one) for one in stored_in[column]):
            odd.append((where, "missing values", empty))
        bad = unreadable(values)
        odd.append((where, "rows with infinity, or NaN or nothing inside a list", bad))
    for where, what, bad in odd:
        faults.add(where, what, bad & keep, block.named)
    return None if keep.all() else keep


def _has_value(made: Field) -> bool:
    """Whether missing values have a place."""
    return made.fill is not None or made.has_missing
