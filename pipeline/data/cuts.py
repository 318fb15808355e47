"""What a split needs a pass over the rows for: where a split by time begins, and the strata."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.arrow import missing, plain
from pipeline.data.blocks import Block
from pipeline.data.columns import RowName
from pipeline.data.columns.base import column_errors, refuse_rows
from pipeline.data.fingerprint import GOLDEN_GAMMA, Hashes, hash_rows, mix
from pipeline.data.reader import Source
from pipeline.data.sampler import Rows
from pipeline.errors import DataError
from pipeline.spec.data import Data
from pipeline.spec.split import HeldOutSplit, Split

Strata = dict[str, tuple[int, int]]
"""For each class, from and to which hash its rows are held out."""
Cut = float | Strata | None
"""What a pass over the source finds out: where a split by time begins, or the strata."""
LeftIn = Callable[[Block], tuple[Rows, Rows]]
MAX_STRATA = 10_000
FEW_CLASSES = 20


def names_rows(num_values: int, num_rows: int) -> bool:
    """Whether a column has too many values for classes: amounts, or a name of each row."""
    return num_values > FEW_CLASSES and 2 * num_values > num_rows


def find_cut(
    data: Data,
    split: HeldOutSplit,
    source: Source,
    left_in: LeftIn,
) -> Cut:
    """Where a split by time begins, or the strata of one that is stratified; else None.

    `left_in(block)` are the indices of a block's rows that the split may take, and those of all
    that are not dropped. A pass over the source, but for `since`. Raises DataError for a column
    that has no order, or too many classes.
    """
    asked = data.held_out(split)
    if isinstance(asked, Split) and asked.stratify is not None:
        return _strata(data, asked, split, source, left_in)
    if not isinstance(asked, Split) or asked.time is None:
        return None
    where = f"data.{split}: column {asked.time!r}"
    if asked.since is not None:
        kind = source.dataset.schema.field(asked.time).type
        first = _since(asked, kind, where, f"data.{split}.since")
    else:
        first = _first(asked, source, where, left_in)
    number: float = first.item() if isinstance(first, np.generic) else first
    return number


def _since(split: Split, kind: pa.DataType, where: str, key: str) -> Any:
    """The instant that the spec names."""
    if not pa.types.is_temporal(kind):
        if isinstance(split.since, str):
            raise DataError(
                f"{key}: {split.since!r} is not a {kind}, as column {split.column!r} holds"
            )
        return split.since
    try:
        values = pa.array([str(split.since)])
        if pa.types.is_timestamp(kind):
            at = np.datetime64(datetime.fromisoformat(str(split.since)).replace(tzinfo=None))
            offset = datetime.fromisoformat(str(split.since)).utcoffset() or timedelta()
            instant = at - np.timedelta64(offset)
            return int(instant.astype(f"datetime64[{kind.unit}]").astype(np.int64))
        return instants_of(values.cast(kind), where)[0]
    except (pa.ArrowException, ValueError, TypeError):
        raise DataError(
            f"{key}: {split.since!r} is not a {kind}, as column {split.column!r} holds; write "
            "dates as 2013-11-01"
        ) from None


def _first(split: Split, source: Source, where: str, left_in: LeftIn) -> Any:
    """The first instant that is held out: as near to the fraction as equal times allow."""
    parts = []
    num_rows = 0
    for block in source.blocks():
        left, kept = left_in(block)
        column = block.table[split.column].take(left)
        refuse_missing(column, where, block.row_namer(left))
        parts.append(instants_of(column, where))
        num_rows += len(kept)
    instants = np.sort(np.concatenate(parts)) if parts else np.empty(0)
    if not len(instants):
        return 0
    wanted = num_rows * (split.fraction or 0.0)
    first = instants[-min(len(instants), max(1, round(wanted)))]
    num_from, num_after = (
        len(instants) - np.searchsorted(instants, first, side) for side in ("left", "right")
    )
    if num_after and abs(num_after - wanted) < abs(num_from - wanted):
        return instants[-num_after]
    return first


def _strata(
    data: Data,
    asked: Split,
    split: HeldOutSplit,
    source: Source,
    left_in: LeftIn,
) -> Strata:
    """From and to which hash rows of each class are held out: so many as their share.

    What is left of a row is rounded up for some classes and down for others, by their names, so
    that many small classes do not all lack theirs.
    """
    column = asked.column
    where = f"data.{split}: column {column!r}"
    if pa.types.is_nested(source.dataset.schema.field(column).type):
        raise DataError(f"{where} has several values a row; name a column of classes")
    hashes: dict[str, list[Hashes]] = {}
    counts: Counter[str] = Counter()
    for block in source.blocks():
        left, kept = left_in(block)
        table = take_rows(block.table, left)
        refuse_missing(table[column], where, block.row_namer(left))
        mixed = drawn_hashes(table, telling_columns(data, source), data, asked)
        for value, rows in rows_by_class(table[column]):
            hashes.setdefault(value, []).append(mixed[rows])
        if len(hashes) > MAX_STRATA:
            raise DataError(f"{where} has more than {MAX_STRATA} values; name a column of classes")
        of_class = rows_by_class(take_rows(block.table.select([column]), kept)[column])
        counts.update({value: len(rows) for value, rows in of_class})
    if names_rows(len(hashes), sum(counts.values())):
        text = f"{len(hashes):,} values in {sum(counts.values()):,} rows; name a column of classes"
        raise DataError(f"{where} has {text}")
    strata = {}
    for value, parts in hashes.items():
        drawn = np.sort(np.concatenate(parts))
        low, high = _places(asked, split, len(drawn), counts[value], _offset(value))
        strata[value] = (_end(drawn, low) if low else 0, _end(drawn, high))
    return strata


def _places(
    asked: Split, split: HeldOutSplit, num_left: int, num_all: int, offset: float
) -> tuple[int, int]:
    """From and to which of a class's rows that are left, by hash, are held out."""
    if asked.folds and asked.fold:
        ends = (num_left * (asked.fold + each) / asked.folds + offset for each in (-1, 0))
        low, high = map(math.floor, ends)
        return low, high
    num = min(math.floor(num_all * (asked.fraction or 0.0) + offset), num_left)
    return (0, num) if split == "validation" else (num_left - num, num_left)


def _end(hashes: Any, place: int) -> int:
    """The hash at which the rows from a place on begin."""
    return int(hashes[place]) if place < len(hashes) else 2**64


def _offset(value: str) -> float:
    """A number from 0 to 1 that belongs to a class."""
    return zlib.crc32(value.encode()) / 2**32


def rows_by_class(column: Any) -> Iterator[tuple[str, Rows]]:
    """Each value of a column, as text, and the rows that have it."""
    encoded = plain(column).dictionary_encode()
    codes = np.asarray(encoded.indices)
    for code, value in enumerate(encoded.dictionary.to_pylist()):
        yield str(value), np.flatnonzero(codes == code)


def telling_columns(data: Data, source: Source) -> list[str]:
    """Columns that tell one row from another: not those that rows are held out by alone."""
    other_keys = data.split_columns.values()
    return [name for name, key in source.wanted.items() if key not in other_keys]


def refuse_missing(column: Any, where: str, row_name: RowName) -> None:
    bad = missing(column)
    fix = "data.missing can drop these rows"
    with column_errors(where, row_name):
        refuse_rows(bad, "no value, which belongs to no split,", fix)


def instants_of(column: Any, where: str) -> NDArray[Any]:
    """Times as whole numbers, numbers as they are."""
    values = plain(column)
    types = pa.types
    if types.is_temporal(values.type):
        width = values.type.bit_width
        return np.asarray(values.view(pa.int64() if width == 64 else pa.int32()))
    if types.is_integer(values.type) or types.is_floating(values.type):
        return np.asarray(values)
    raise DataError(f"{where} is {values.type}: expected dates, times or numbers")


def drawn_hashes(table: pa.Table, columns: list[str], data: Data, asked: float | Split) -> Hashes:
    """One hash for each row of what the columns hold, as drawn by the spec's seed.

    Folds have others than fractions: those of what a fraction has left are of one size.
    """
    shift = np.uint64(data.split_seed * int(GOLDEN_GAMMA) % 2**64)
    drawn = mix(hash_rows(table, columns) + shift)
    return mix(drawn + GOLDEN_GAMMA) if isinstance(asked, Split) and asked.folds else drawn


def take_rows(table: pa.Table, rows: Rows) -> pa.Table:
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
    """A copy in one piece: of slices of nested lists `take` gives wrong rows (Arrow 25)."""
    half = len(column) // 2
    return pa.concat_arrays([*column.slice(0, half).chunks, *column.slice(half).chunks])
