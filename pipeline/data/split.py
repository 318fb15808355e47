"""Which rows are trained on, which are held out for validation or test, and which are dropped.

By each row's own content, not its position: a row stays on its side when rows are appended, files
are cut otherwise, or workers change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.blocks import Block
from pipeline.data.columns import Field, RowName
from pipeline.data.cuts import (
    Cut,
    drawn_hashes,
    find_cut,
    instants_of,
    refuse_missing,
    rows_by_class,
    take_rows,
    telling_columns,
)
from pipeline.data.fingerprint import Hashes
from pipeline.data.missing import InvalidRows, kept_rows
from pipeline.data.reader import Source
from pipeline.data.sampler import Rows
from pipeline.spec.data import Data
from pipeline.spec.split import HeldOutSplit, Split

SPLITS = ("train", "validation", "test")
DRAWN: tuple[HeldOutSplit, ...] = ("test", "validation")
"""Splits in the order in which they take rows of the training files."""
Chooser = Callable[[pa.Table, RowName], NDArray[np.bool_]]
"""True for each row that is held out; rows have names for messages."""


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
        table = take_rows(block.table, kept)
        chosen = self._choose(source, table, block.row_namer(kept))
        splits = []
        for split in SPLITS:
            if split in chosen and chosen[split].any():
                rows = np.flatnonzero(chosen[split])
                splits.append(SplitRows(split, take_rows(table, rows), block, kept[rows]))
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
        chosen = self._choose(source, take_rows(block.table, rows), block.row_namer(rows))
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
    used = telling_columns(data, source)
    column = asked.column if isinstance(asked, Split) else ""
    where = f"data.{split}: column {column!r}"
    if isinstance(asked, float) or not column:
        return lambda table, _: _between(drawn_hashes(table, used, data, asked), *bounds)
    if asked.group is not None:

        def grouped(table: pa.Table, row_name: RowName) -> NDArray[np.bool_]:
            refuse_missing(table[column], where, row_name)
            return _between(drawn_hashes(table, [column], data, asked), *bounds)

        return grouped
    if asked.stratify is not None:
        assert isinstance(cut, dict)

        def stratified(table: pa.Table, row_name: RowName) -> NDArray[np.bool_]:
            refuse_missing(table[column], where, row_name)
            hashes, chosen = drawn_hashes(table, used, data, asked), np.zeros(len(table), bool)
            for value, rows in rows_by_class(table[column]):
                low, high = cut.get(value, (0, 0))
                chosen[rows] = _between(hashes[rows], low, high)
            return chosen

        return stratified
    first = cut

    def later(table: pa.Table, row_name: RowName) -> NDArray[np.bool_]:
        refuse_missing(table[column], where, row_name)
        return np.asarray(instants_of(table[column], where) >= first)

    return later


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


def _between(hashes: Hashes, low: int, high: int) -> NDArray[np.bool_]:
    """True from `low` to below `high`."""
    if low >= high:
        return np.zeros(len(hashes), bool)
    chosen: NDArray[np.bool_] = hashes >= np.uint64(low)
    return chosen if high == 2**64 else chosen & (hashes < np.uint64(high))
