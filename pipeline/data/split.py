"""Which rows are trained on, which are held out for validation or test, and which are dropped.

By each row's own content, not its position: a row stays on its side when rows are appended, files
are cut otherwise, or workers change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.arrow import flat, missing, plain
from pipeline.data.blocks import Block
from pipeline.data.columns import Field, RowName
from pipeline.data.columns.base import column_errors, refuse_rows
from pipeline.data.missing import InvalidRows, kept_rows
from pipeline.data.reader import Source
from pipeline.data.sampler import Rows
from pipeline.errors import DataError
from pipeline.spec.data import Data, HeldOutSplit, Split

SPLITS = ("train", "validation", "test")
DRAWN: tuple[HeldOutSplit, ...] = ("test", "validation")
"""Splits in the order in which they take rows of the training files."""
Chooser = Callable[[pa.Table, RowName], NDArray[np.bool_]]
"""True for each row that is held out; rows have names for messages."""
Hashes = NDArray[np.uint64]
GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class SplitRows:
    """Rows of one split."""

    split: str
    table: pa.Table
    block: Block
    """The block that they come from."""
    positions: Rows
    """Where they stand in it."""

    @property
    def row_name(self) -> RowName:
        """Their names, for messages."""
        return self.block.row_namer(self.positions)


class Splitter:
    """Sorts the rows of each block into splits.

    `firsts` is where each split by time begins; found by a pass over the source unless it is known.
    """

    def __init__(
        self,
        data: Data,
        source: Source,
        fields: Mapping[str, Field],
        firsts: Mapping[str, float | None] | None = None,
    ) -> None:
        self.data, self.fields = data, fields
        self.firsts: dict[str, float | None] = {}
        self.choosers: dict[HeldOutSplit, Chooser] = {}
        """Of the splits that are taken out of the source."""
        for split in DRAWN:
            if firsts is None:
                first = first_held_out(data, split, source, partial(self._left, source))
            else:
                first = firsts[split]
            self.firsts[split] = first
            if choose := chooser(data, split, source, first):
                self.choosers[split] = choose

    def split(
        self, source: Source, block: Block, invalid: InvalidRows | None = None
    ) -> list[SplitRows]:
        """The block's rows of each split that has any.

        Missing values that have no policy, and invalid ones, are added to `invalid`.
        """
        kept = self._kept_rows(source, block, invalid)
        table = _take(block.table, kept)
        chosen = self._choose(source, table, block.row_namer(kept))
        splits = []
        for split in SPLITS:
            if split in chosen and chosen[split].any():
                rows = np.flatnonzero(chosen[split])
                splits.append(SplitRows(split, _take(table, rows), block, kept[rows]))
        return splits

    def _choose(
        self, source: Source, table: pa.Table, row_name: RowName
    ) -> dict[str, NDArray[np.bool_]]:
        """Which of a source's rows are in each split: a row is in one."""
        left = np.ones(len(table), bool)
        if source.split != "train":
            return {source.split: left}
        chosen: dict[str, NDArray[np.bool_]] = {}
        for split, choose in self.choosers.items():
            chosen[split] = left & choose(table, row_name)
            left = left & ~chosen[split]
        return {"train": left, **chosen}

    def _left(self, source: Source, block: Block) -> tuple[Rows, int]:
        """A block's rows that no split has taken so far, of how many that are not dropped."""
        rows = self._kept_rows(source, block)
        chosen = self._choose(source, _take(block.table, rows), block.row_namer(rows))
        return rows[chosen["train"]], len(rows)

    def _kept_rows(self, source: Source, block: Block, invalid: InvalidRows | None = None) -> Rows:
        return kept_rows(self.data, source, self.fields, block, invalid or InvalidRows())


def chooser(
    data: Data, split: HeldOutSplit, source: Source, first: float | None = None
) -> Chooser | None:
    """Tells which rows of `source` are held out for a split; None if it takes none of them.

    A split by time needs the `first` instant that is held out. Raises DataError for a column that
    cannot be split by.
    """
    asked = data.held_out(split)
    if isinstance(asked, float):
        other_keys = data.split_columns.values()
        used = [name for name, key in source.wanted.items() if key not in other_keys]
        return lambda table, _: _draw(_hash_rows(table, used), split, asked, data.split_seed)
    if not isinstance(asked, Split):
        return None
    column = asked.column
    where = f"data.{split}: column {column!r}"
    if asked.group is not None:
        fraction = asked.fraction or 0.0

        def grouped(table: pa.Table, row_name: RowName) -> NDArray[np.bool_]:
            _refuse_missing(table[column], where, row_name)
            return _draw(_hash_rows(table, [column]), split, fraction, data.split_seed)

        return grouped

    def later(table: pa.Table, row_name: RowName) -> NDArray[np.bool_]:
        _refuse_missing(table[column], where, row_name)
        return np.asarray(_instants(table[column], where) >= first)

    return later


def first_held_out(
    data: Data,
    split: HeldOutSplit,
    source: Source,
    left_in: Callable[[Block], tuple[Rows, int]],
) -> float | None:
    """Where a split by time begins: the number that stands for it; None for any other split.

    `left_in(block)` are the indices of a block's rows that the split may take, and how many are not
    dropped. A fraction needs a pass over the source. Raises DataError for a column that has no
    order.
    """
    asked = data.held_out(split)
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
        return _instants(values.cast(kind), where)[0]
    except (pa.ArrowException, ValueError, TypeError):
        raise DataError(
            f"{key}: {split.since!r} is not a {kind}, as column {split.column!r} holds; write "
            "dates as 2013-11-01"
        ) from None


def _first(
    split: Split, source: Source, where: str, left_in: Callable[[Block], tuple[Rows, int]]
) -> Any:
    """The first instant that is held out: as near to the fraction as equal times allow."""
    parts = []
    num_rows = 0
    for block in source.blocks():
        left, num_kept = left_in(block)
        column = block.table[split.column].take(left)
        _refuse_missing(column, where, block.row_namer(left))
        parts.append(_instants(column, where))
        num_rows += num_kept
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


def _refuse_missing(column: Any, where: str, row_name: RowName) -> None:
    bad = missing(column)
    fix = "data.missing can drop these rows"
    with column_errors(where, row_name):
        refuse_rows(bad, "no value, which belongs to no split,", fix)


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


def _draw(hashes: Hashes, split: HeldOutSplit, fraction: float, seed: int) -> NDArray[np.bool_]:
    """True for about `fraction` of all hashes, drawn by `seed`.

    Validation takes the lowest and test the highest: two draws of rows, or of the same groups, have
    none in common.
    """
    mixed = _finalize(hashes + np.uint64(seed * int(GOLDEN_GAMMA) % 2**64))
    limit = np.uint64(fraction * 2.0**64)
    chosen: NDArray[np.bool_] = mixed < limit if split == "validation" else ~mixed < limit
    return chosen


def _hash_rows(table: pa.Table, columns: list[str]) -> Hashes:
    """One hash for each row, of the values in `columns`."""
    hashes = np.zeros(len(table), np.uint64)
    for column in columns:
        hashes = _finalize(hashes * GOLDEN_GAMMA + _hash_column(table[column]))
    return hashes


def _hash_column(column: Any) -> Hashes:
    """One hash for each row of a column; a list's is the sum of its items', each by its place."""
    array = plain(column)
    if not pa.types.is_nested(array.type):
        return _hash_values(array)
    values, offsets = flat(array)
    if offsets is None:  # lists of one size; those that are missing have no values
        lengths = (~missing(array)).astype(np.int64)
        lengths *= len(values) // max(1, int(lengths.sum()))
        offsets = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.arange(len(values)) - np.repeat(offsets[:-1], np.diff(offsets))
    items = _finalize(_hash_values(values) + positions.astype(np.uint64) * GOLDEN_GAMMA)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(items, dtype=np.uint64)])
    hashes: Hashes = sums[offsets[1:]] - sums[offsets[:-1]] + np.diff(offsets).astype(np.uint64)
    return hashes


def _hash_values(array: Any) -> Hashes:
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


def _finalize(values: Hashes) -> Hashes:
    """Every bit of each value spread over all its bits (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _take(table: pa.Table, rows: Rows) -> pa.Table:
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
