"""Which rows are trained on, which are held out for validation or test, and which are dropped.

By each row's own content, not its position: a row stays on its side when rows are appended, files
are cut otherwise, or workers change.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.arrow import missing, plain
from pipeline.data.blocks import Block
from pipeline.data.columns import Field, RowName
from pipeline.data.columns.base import column_errors, refuse_rows
from pipeline.data.fingerprint import GOLDEN_GAMMA, Hashes, hash_rows, mix
from pipeline.data.missing import InvalidRows, kept_rows
from pipeline.data.reader import Source
from pipeline.data.sampler import Rows
from pipeline.errors import DataError
from pipeline.spec.data import Data
from pipeline.spec.split import HeldOutSplit, Split

SPLITS = ("train", "validation", "test")
DRAWN: tuple[HeldOutSplit, ...] = ("test", "validation")
"""Splits in the order in which they take rows of the training files."""
Chooser = Callable[[pa.Table, RowName], NDArray[np.bool_]]
"""True for each row that is held out; rows have names for messages."""
Strata = dict[str, tuple[int, int]]
"""For each class, from and to which hash its rows are held out."""
Cut = float | Strata | None
"""What a pass over the source finds out: where a split by time begins, or the strata."""
LeftIn = Callable[[Block], tuple[Rows, Rows]]
MAX_STRATA = 10_000


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

    `cuts` is where a split by time begins, and the strata; found by a pass over the source unless
    they are known.
    """

    def __init__(
        self,
        data: Data,
        source: Source,
        fields: Mapping[str, Field],
        cuts: Mapping[str, Cut] | None = None,
    ) -> None:
        self.data, self.fields = data, fields
        self.cuts: dict[str, Cut] = {}
        self.choosers: dict[HeldOutSplit, Chooser] = {}
        """Of the splits that are taken out of the source."""
        for split in DRAWN:
            if cuts is None:
                cut = find_cut(data, split, source, partial(self._left, source))
            else:
                cut = cuts[split]
            self.cuts[split] = cut
            if choose := chooser(data, split, source, cut):
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

    def _left(self, source: Source, block: Block) -> tuple[Rows, Rows]:
        """A block's rows that no split has taken so far, and all that are not dropped."""
        rows = self._kept_rows(source, block)
        chosen = self._choose(source, _take(block.table, rows), block.row_namer(rows))
        return rows[chosen["train"]], rows

    def _kept_rows(self, source: Source, block: Block, invalid: InvalidRows | None = None) -> Rows:
        return kept_rows(self.data, source, self.fields, block, invalid or InvalidRows())


def chooser(data: Data, split: HeldOutSplit, source: Source, cut: Cut = None) -> Chooser | None:
    """Tells which rows of `source` are held out for a split; None if it takes none of them.

    A split by time or with strata needs the `cut`. Raises DataError for a column that cannot be
    split by.
    """
    asked = data.held_out(split)
    if not isinstance(asked, float | Split):
        return None
    bounds = _bounds(asked, split)
    used = _used(data, source)
    column = asked.column if isinstance(asked, Split) else ""
    where = f"data.{split}: column {column!r}"
    if isinstance(asked, float) or not column:
        return lambda table, _: _between(_mixed(table, used, data, asked), *bounds)
    if asked.group is not None:

        def grouped(table: pa.Table, row_name: RowName) -> NDArray[np.bool_]:
            _refuse_missing(table[column], where, row_name)
            return _between(_mixed(table, [column], data, asked), *bounds)

        return grouped
    if asked.stratify is not None:
        assert isinstance(cut, dict)

        def stratified(table: pa.Table, row_name: RowName) -> NDArray[np.bool_]:
            _refuse_missing(table[column], where, row_name)
            hashes, chosen = _mixed(table, used, data, asked), np.zeros(len(table), bool)
            for value, rows in _classes(table[column]):
                low, high = cut.get(value, (0, 0))
                chosen[rows] = _between(hashes[rows], low, high)
            return chosen

        return stratified
    first = cut

    def later(table: pa.Table, row_name: RowName) -> NDArray[np.bool_]:
        _refuse_missing(table[column], where, row_name)
        return np.asarray(_instants(table[column], where) >= first)

    return later


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
        return _instants(values.cast(kind), where)[0]
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
        _refuse_missing(column, where, block.row_namer(left))
        parts.append(_instants(column, where))
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
        table = _take(block.table, left)
        _refuse_missing(table[column], where, block.row_namer(left))
        mixed = _mixed(table, _used(data, source), data, asked)
        for value, rows in _classes(table[column]):
            hashes.setdefault(value, []).append(mixed[rows])
        if len(hashes) > MAX_STRATA:
            raise DataError(f"{where} has more than {MAX_STRATA} values; name a column of classes")
        of_class = _classes(_take(block.table.select([column]), kept)[column])
        counts.update({value: len(rows) for value, rows in of_class})
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


def _classes(column: Any) -> Iterator[tuple[str, Rows]]:
    """Each value of a column, as text, and the rows that have it."""
    encoded = plain(column).dictionary_encode()
    codes = np.asarray(encoded.indices)
    for code, value in enumerate(encoded.dictionary.to_pylist()):
        yield str(value), np.flatnonzero(codes == code)


def _used(data: Data, source: Source) -> list[str]:
    """Columns that tell one row from another: not those that rows are held out by alone."""
    other_keys = data.split_columns.values()
    return [name for name, key in source.wanted.items() if key not in other_keys]


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


def _bounds(asked: float | Split, split: HeldOutSplit) -> tuple[int, int]:
    """From and to which of 2**64 hashes rows are held out.

    Validation takes the lowest and test the highest: two draws of rows, or of the same groups, have
    none in common.
    """
    if isinstance(asked, Split) and asked.folds and asked.fold:
        return (asked.fold - 1) * 2**64 // asked.folds, asked.fold * 2**64 // asked.folds
    share = asked if isinstance(asked, float) else asked.share or 0.0
    limit = int(share * 2.0**64)
    return (0, limit) if split == "validation" else (2**64 - limit, 2**64)


def _mixed(table: pa.Table, columns: list[str], data: Data, asked: float | Split) -> Hashes:
    """One hash for each row of what the columns hold, as drawn by the spec's seed.

    Folds have others than fractions: those of what a fraction has left are of one size.
    """
    shift = np.uint64(data.split_seed * int(GOLDEN_GAMMA) % 2**64)
    drawn = mix(hash_rows(table, columns) + shift)
    return mix(drawn + GOLDEN_GAMMA) if isinstance(asked, Split) and asked.folds else drawn


def _between(hashes: Hashes, low: int, high: int) -> NDArray[np.bool_]:
    """True from `low` to below `high`."""
    if low >= high:
        return np.zeros(len(hashes), bool)
    chosen: NDArray[np.bool_] = hashes >= np.uint64(low)
    return chosen if high == 2**64 else chosen & (hashes < np.uint64(high))


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
