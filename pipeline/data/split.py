"""Which rows are held out for validation: of each row's own content, not of its place.

A row stays on its side when rows are appended, files are cut otherwise, or workers change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.arrow import flat, missing, plain
from pipeline.data.source import Block, Source
from pipeline.dataspec import Data, Split
from pipeline.errors import DataError

Chooser = Callable[[Block], NDArray[np.bool_]]
"""True for each row of a block that is held out."""
Hashes = NDArray[np.uint64]
ODD = np.uint64(0x9E3779B97F4A7C15)


def chooser(data: Data, source: Source) -> Chooser | None:
    """Tells which rows of `source` are for validation; None without a split.

    Raises DataError for a column that cannot be split by.
    """
    split = data.validation
    if isinstance(split, float):
        columns = list(source.wanted)
        return lambda block: _below(_of_rows(block.table, columns), split, data.split_seed)
    if not isinstance(split, Split):
        return None
    where = f"data.validation: column {split.column!r}"
    if split.group is not None:
        group, fraction = split.group, split.fraction or 0.0

        def grouped(block: Block) -> NDArray[np.bool_]:
            _refuse_missing(block, group, where)
            return _below(_of_rows(block.table, [group]), fraction, data.split_seed)

        return grouped
    column = split.column
    kind = source.dataset.schema.field(column).type
    first = _first(split, kind, source, where)

    def later(block: Block) -> NDArray[np.bool_]:
        _refuse_missing(block, column, where)
        return np.asarray(_instants(block.table[column], where) >= first)

    return later


def _first(split: Split, kind: pa.DataType, source: Source, where: str) -> Any:
    """The first instant of the validation rows."""
    if split.since is not None:
        try:
            value: Any = split.since if not pa.types.is_temporal(kind) else str(split.since)
            if pa.types.is_timestamp(kind):
                value = np.datetime64(value, kind.unit).item()
            return _instants(pa.array([value]).cast(kind), where)[0]
        except (pa.ArrowException, ValueError, TypeError):
            text = f"data.validation.since: {split.since!r} is no {kind}, as column"
            raise DataError(f"{text} {split.column!r} holds; write dates as 2013-11-01") from None
    found = []
    for block in source.blocks([split.column]):
        _refuse_missing(block, split.column, where)
        found.append(_instants(block.table[split.column], where))
    instants = np.sort(np.concatenate(found)) if found else np.empty(0)
    if not len(instants):
        return 0
    number = max(1, round(len(instants) * (split.fraction or 0.0)))
    return instants[-number]


def _refuse_missing(block: Block, column: str, where: str) -> None:
    bad = np.flatnonzero(missing(block.table[column]))
    if len(bad):
        row = block.named(int(bad[0]))
        raise DataError(f"{where}: no value in row {row} (counted from 0): which side is it on?")


def _instants(column: Any, where: str) -> NDArray[Any]:
    """Times as whole numbers, numbers as they are."""
    values = plain(column)
    types = pa.types
    if types.is_temporal(values.type):
        width = values.type.bit_width
        return np.asarray(values.view(pa.int64() if width == 64 else pa.int32()))
    if types.is_integer(values.type) or types.is_floating(values.type):
        return np.asarray(values)
    raise DataError(f"{where} is {values.type}: expected dates, times or numbers")


def _below(hashes: Hashes, fraction: float, seed: int) -> NDArray[np.bool_]:
    """True for about `fraction` of all hashes, drawn by `seed`."""
    mixed = _finished(hashes + np.uint64(seed * int(ODD) % 2**64))
    chosen: NDArray[np.bool_] = mixed < np.uint64(fraction * 2.0**64)
    return chosen


def _of_rows(table: pa.Table, columns: list[str]) -> Hashes:
    """One hash for each row, of the values in `columns`."""
    found = np.zeros(len(table), np.uint64)
    for column in columns:
        found = _finished(found * ODD + _of_column(table[column]))
    return found


def _of_column(column: Any) -> Hashes:
    """One hash for each row of a column; a list's is the sum of its items', each by its place."""
    array = plain(column)
    if not pa.types.is_nested(array.type):
        return _of_values(array)
    values, offsets = flat(array)
    if offsets is None:  # lists of one size; those that are missing have no values
        lengths = (~missing(array)).astype(np.int64)
        lengths *= len(values) // max(1, int(lengths.sum()))
        offsets = np.concatenate([[0], np.cumsum(lengths)])
    places = np.arange(len(values)) - np.repeat(offsets[:-1], np.diff(offsets))
    items = _finished(_of_values(values) + places.astype(np.uint64) * ODD)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(items, dtype=np.uint64)])
    found: Hashes = sums[offsets[1:]] - sums[offsets[:-1]] + np.diff(offsets).astype(np.uint64)
    return found


def _of_values(array: Any) -> Hashes:
    """Hashes that are the same for a number in any type."""
    from pandas.util import hash_array

    types = pa.types
    if types.is_temporal(array.type):
        array = array.view(pa.int64() if array.type.bit_width == 64 else pa.int32())
    if types.is_boolean(array.type):
        array = array.cast(pa.int8())
    if (
        types.is_integer(array.type)
        or types.is_floating(array.type)
        or types.is_decimal(array.type)
    ):
        numbers = array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        return np.asarray(hash_array(numbers + 0.0), np.uint64)  # -0.0 is 0.0
    return np.asarray(hash_array(array.to_numpy(zero_copy_only=False)), np.uint64)


def _finished(values: Hashes) -> Hashes:
    """Every bit of each value spread over all its bits (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
