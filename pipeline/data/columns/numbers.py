"""Columns of numbers: single ones, tensors of one shape, and lists of different lengths."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from pipeline.data.arrow import flat, is_text, plain
from pipeline.data.batch import Column, Ragged
from pipeline.data.columns.base import (
    MEAN,
    Amount,
    ColumnError,
    Encoded,
    Field,
    FloatType,
    Lists,
    Profile,
    Statistics,
)
from pipeline.data.columns.moments import Moments
from pipeline.spec.data import Scale

MAX_SORTED = 50_000_000
"""Numbers of a column that are kept in memory for their quartiles."""


@dataclass(frozen=True)
class _Scaled(Field):
    """Numbers, of which a mean is subtracted and which are divided by a deviation."""

    mean: Amount = 0.0
    """The training rows' mean: of each position of a vector, unless the scale is `shared`."""
    deviation: Amount = 1.0
    center: Amount = 0.0
    log: bool = False
    """Whether log(1 + x) is taken before anything else."""

    is_amount: ClassVar[bool] = True

    def statistics(self, scale: Scale = "none", unless_binary: bool = False) -> Statistics:
        return NumberStatistics(self, scale, unless_binary)

    def scaled(self, values: Any) -> NDArray[np.float64]:
        """Flat Arrow numbers, scaled. Raises ColumnError for what cannot be."""
        numbers = as_numbers(values)
        if self.fill is not None:
            numbers = np.where(np.isnan(numbers), self.fill, numbers)
        if self.log:
            numbers = log1p(numbers)
        if isinstance(self.mean, tuple):  # one for each position
            if len(numbers) % len(self.mean):
                raise ColumnError(
                    f"has rows that do not hold {len(self.mean)} numbers, as in training"
                )
            numbers = numbers.reshape(-1, len(self.mean))
        return np.asarray((numbers - self.mean) / self.deviation).reshape(-1)


@dataclass(frozen=True)
class Number(_Scaled):
    """One number: float [N]."""

    counts: tuple[int, ...] | None = None
    """How many rows are 0 and 1, where a target holds nothing else."""
    is_float64: bool = False
    """Whether it is stored in float64, whatever the precision."""

    kind: ClassVar[str] = "number"
    is_single: ClassVar[bool] = True
    is_cell: ClassVar[bool] = True

    def fill_mean(self) -> Field | None:
        return None if self.role in ("weight", "exposure") else replace(self, fill=MEAN)

    def fill_constant(self, value: float | str, arrow_type: pa.DataType) -> Field | None:
        if isinstance(value, str):
            raise ColumnError(f"is {value!r}, which is not a number")
        return replace(self, fill=value)

    def statistics(self, scale: Scale = "none", unless_binary: bool = False) -> Statistics:
        if self.role in ("weight", "exposure"):
            return WeightStatistics(self)
        return super().statistics(scale, unless_binary)

    def dtype(self, float_dtype: FloatType) -> np.dtype[Any]:
        return np.dtype(np.float64 if self.is_float64 else float_dtype)

    def check_readable(self, column: Any) -> None:
        super().check_readable(column)
        self.refuse_bad_weights(as_numbers(column))

    def refuse_bad_weights(self, numbers: NDArray[np.float64]) -> None:
        """Raise ColumnError for weights below 0, and for exposures that are not above it."""
        if self.role not in ("weight", "exposure"):
            return
        is_exposure = self.role == "exposure"
        bad = numbers <= 0 if is_exposure else numbers < 0
        if bad.any():
            wanted = "exposures are above 0" if is_exposure else "weights are at least 0"
            raise ColumnError(f"holds {numbers[bad][0]:g}, and {wanted}", rows=bad)

    def encode(self, column: Any, dtype: np.dtype[Any]) -> Encoded:
        return narrowed(self.scaled(column), dtype)

    def from_cells(self, cells: Any) -> Any:
        if is_text(cells.type):
            raise ColumnError(f"holds {cells.type}, expected numbers ({self.arrow_type})")
        return super().from_cells(cells)


@dataclass(frozen=True)
class FixedTensor(_Scaled):
    """Numbers in one shape: float [N, *shape]."""

    kind: ClassVar[str] = "tensor"

    def encode(self, column: Any, dtype: np.dtype[Any]) -> Encoded:
        scaled = self.scaled(flat(column)[0])
        if len(scaled) != len(column) * math.prod(self.shape):
            raise ColumnError(f"has rows that do not hold {self.shape} numbers, as in training")
        return narrowed(scaled.reshape(len(column), *self.shape), dtype)


@dataclass(frozen=True)
class Series(_Scaled):
    """Lists of numbers: ragged float."""

    kind: ClassVar[str] = "series"
    is_list: ClassVar[bool] = True

    def encode(self, column: Any, dtype: np.dtype[Any]) -> Encoded:
        values, offsets = flat(column)
        return Lists(narrowed(self.scaled(values), dtype), np.diff(offsets))

    def gather(
        self, values: NDArray[Any], starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> Column:
        return padded(values, starts, lengths, values.dtype)


class NumberStatistics(Statistics):
    """Mean and spread of numbers: alone, in tensors, or in lists.

    Vectors have statistics for each of their positions, and so have lists that turn out to have
    one size in all training rows: they are vectors.
    """

    field: _Scaled

    def __init__(self, field: _Scaled, scale: Scale, unless_binary: bool) -> None:
        super().__init__(field)
        self.scale, self.unless_binary = scale, unless_binary
        self.raw = Moments()
        self.scaled = Moments()
        is_vector = isinstance(field, FixedTensor) and len(field.shape) == 1
        self.width = field.shape[0] if is_vector else None
        self.lengths: set[int] = set()
        """Lengths of lists, until there are two."""
        self.by_position: tuple[Moments, Moments] | None = None
        self.is_binary = True
        self.kept: list[NDArray[np.float64]] = []
        """All numbers, where quartiles are wanted."""

    def observe(self, column: Any) -> None:
        values, offsets = flat(column)
        numbers = as_numbers(values)
        if self.field.fill is not None and self.field.fill != MEAN:
            numbers = np.where(np.isnan(numbers), self.field.fill, numbers)
        known = numbers[~np.isnan(numbers)]
        self.is_binary = self.is_binary and bool(((known == 0) | (known == 1)).all())
        self.raw.add(known)
        if self.scale == "robust":
            self._keep(known)
        logs = known
        if self.scale == "log":
            logs = log1p(numbers, _rows_of(numbers <= -1, len(column), offsets))[~np.isnan(numbers)]
            self.scaled.add(logs)
        if isinstance(self.field, Series) and offsets is not None:
            self._observe_lengths(np.diff(offsets))
        if self.width is None or len(known) < len(numbers) or not len(known):
            self.by_position = None if self.width is None else self.by_position
            return  # a list with a gap is refused, when all have been counted
        if self.by_position is None:
            self.by_position = Moments(self.width), Moments(self.width)
        for moments, part in zip(self.by_position, (known, logs), strict=True):
            moments.add(part.reshape(-1, self.width))

    def _keep(self, numbers: NDArray[np.float64]) -> None:
        if self.raw.count > MAX_SORTED:
            problem = f"has more than {MAX_SORTED:,} numbers, whose quartiles `robust` asks for"
            raise ColumnError(problem, "take another scale, as `standard` or `log`")
        self.kept.append(numbers)

    def _quartiles(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Median, and what is between the quartiles, or 1 if that is nothing: of each position."""
        width = self.width if self.by_position is not None else 1
        rows = np.concatenate(self.kept).reshape(-1, width or 1)
        low, middle, high = np.percentile(rows, [25, 50, 75], axis=0)
        return middle, np.where(high == low, 1.0, high - low)

    def _observe_lengths(self, lengths: NDArray[np.int64]) -> None:
        """Lists of one length, whichever block they are in, are vectors."""
        if len(self.lengths) < 2:
            self.lengths |= set(lengths.tolist())
        self.width = next(iter(self.lengths)) or None if len(self.lengths) == 1 else None

    def fit(self) -> Field:
        if not self.raw.count and self.field.is_single:
            raise ColumnError("has no value in any training row")
        field: _Scaled = self.field
        raw, scaled = self.raw, self.scaled
        if isinstance(field, Series) and self.width is not None:
            field = FixedTensor(field.name, field.arrow_type, field.role, (self.width,), field.fill)
        if self.by_position is not None and self.scale != "shared":
            raw, scaled = self.by_position
        field = replace(field, center=_amount(raw.mean))
        if field.fill == MEAN:
            field = replace(field, fill=float(self.raw.mean[0]))
        if isinstance(field, Number) and field.is_target and self.is_binary:
            ones = round(float(self.raw.mean[0]) * self.raw.count)
            field = replace(field, counts=(self.raw.count - ones, ones))
        is_flag = self.unless_binary and self.is_binary
        if not raw.count or self.scale == "none" or is_flag:
            return field
        moments = scaled if self.scale == "log" else raw
        if not np.isfinite(moments.deviation).all():
            largest = max(abs(self.raw.low[0]), abs(self.raw.high[0]))
            raise ColumnError(f"holds numbers too large to scale, up to {largest:g}")
        mean, deviation = moments.mean, moments.deviation
        if self.scale == "robust":
            mean, deviation = self._quartiles()
        if self.scale == "min_max":
            span = moments.high - moments.low
            mean = moments.low
            deviation = np.where(span == 0, 1.0, span)
        return replace(
            field, mean=_amount(mean), deviation=_amount(deviation), log=self.scale == "log"
        )

    def profile(self) -> Profile:
        return self.raw.profile()


class WeightStatistics(Statistics):
    """Row weights: none is negative, and one at least is above 0; exposures: all are."""

    field: Number

    def __init__(self, field: Number) -> None:
        super().__init__(field)
        self.moments = Moments()

    def observe(self, column: Any) -> None:
        numbers = as_numbers(plain(column))
        if self.field.fill is not None:
            numbers = np.where(np.isnan(numbers), self.field.fill, numbers)
        self.field.refuse_bad_weights(numbers)
        self.moments.add(numbers)

    def fit(self) -> Field:
        if self.moments.count and self.moments.high[0] == 0:
            raise ColumnError("holds 0 in every training row: no row would count")
        return self.field

    def profile(self) -> Profile:
        return self.moments.profile()


def as_numbers(values: Any) -> NDArray[np.float64]:
    """Arrow values as float64, NaN where there is none.

    Raises ColumnError for text, and for whole numbers from 2^53 on.
    """
    types = pa.types
    is_integer = types.is_integer(values.type)
    if not (
        is_integer
        or types.is_floating(values.type)
        or types.is_decimal(values.type)
        or types.is_boolean(values.type)
    ):
        raise ColumnError(f"is {values.type}, expected numbers")
    numbers = np.asarray(values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False))
    if is_integer and len(numbers) and np.nanmax(abs(numbers), initial=0) >= 2**53:
        raise ColumnError(
            "holds whole numbers of 2^53 and more, which floats cannot tell apart",
            "if they are names, list the column in data.categorical",
        )
    return numbers


def log1p(
    numbers: NDArray[np.float64], bad_rows: NDArray[np.bool_] | None = None
) -> NDArray[np.float64]:
    """log(1 + x) of each number. Raises ColumnError for numbers of -1 and less, in `bad_rows`."""
    if (numbers <= -1).any():
        raise ColumnError(
            "has numbers of -1 or less", "a log scale is for numbers above -1", bad_rows
        )
    return np.log1p(numbers)


def narrowed(numbers: NDArray[np.float64], dtype: np.dtype[Any]) -> NDArray[Any]:
    """The numbers as they are stored. Raises ColumnError for one that the type cannot hold."""
    with np.errstate(over="ignore"):
        stored = numbers.astype(dtype)
    if not np.isfinite(stored).all():
        raise ColumnError(
            f"holds {np.abs(numbers).max():g}, after scaling, which is beyond {dtype}",
            "scale the column, or set training.precision: float64",
        )
    return stored


def padded(
    values: NDArray[Any],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    dtype: np.dtype[Any],
) -> Ragged:
    """The lists that begin at `starts`, padded with 0 to the longest of them."""
    rows = np.zeros((len(lengths), int(lengths.max(initial=0))), dtype)
    ends = np.cumsum(lengths)
    total = ends[-1] if len(ends) else 0
    indices = np.arange(total) + np.repeat(starts - (ends - lengths), lengths)
    rows[np.arange(rows.shape[1]) < lengths[:, None]] = values[indices]
    return Ragged(torch.from_numpy(rows), torch.from_numpy(lengths))


def _rows_of(
    items: NDArray[np.bool_], num_rows: int, offsets: NDArray[np.int64] | None
) -> NDArray[np.bool_] | None:
    """True for each row with an item that is; None if rows without a value hide whose it is."""
    if offsets is None:
        if len(items) % num_rows:
            return None
        return np.asarray(items.reshape(num_rows, -1).any(1))
    rows = np.zeros(num_rows, bool)
    rows[np.searchsorted(offsets, np.flatnonzero(items), side="right") - 1] = True
    return rows


def _amount(values: NDArray[np.float64]) -> Amount:
    """One number, or a tuple of them by position."""
    return float(values[0]) if len(values) == 1 else tuple(values.tolist())
