"""What the training rows say about a column of each kind, block by block."""

from __future__ import annotations

import io
import math
from collections import Counter
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.data import columns
from pipeline.data.arrow import flat, plain
from pipeline.data.columns import Field, Named
from pipeline.dataspec import Scale
from pipeline.errors import DataError

LARGEST_VOCABULARY = 100_000
MEAN = "mean"
"""Stands for a value that is known once all training rows are."""
Profile = dict[str, Any]
"""Plain numbers about one column."""


class Fit(Protocol):
    """What is known of one column so far."""

    made: Field
    """The column before any row was seen: its kind, its shape, what stands for missing values."""

    def add(self, column: Any, named: Named) -> None:
        """Take in the column of some rows. Raises DataError for values that cannot be."""

    def field(self) -> Field:
        """The column, once all training rows are taken in."""

    def profile(self) -> Profile:
        """Numbers about the training rows."""


class Moments:
    """Mean, deviation and range of numbers that come in parts (Chan et al., 1979).

    With `width` these are arrays [width], one for each position of the rows [N, width].
    """

    def __init__(self, width: int = 1) -> None:
        self.count = 0
        self.mean, self.squares = np.zeros(width), np.zeros(width)
        """`squares`: sum of the squared distances from the mean."""
        self.low, self.high = np.full(width, math.inf), np.full(width, -math.inf)

    def add(self, numbers: NDArray[np.float64]) -> None:
        """Take in some numbers [N], or rows [N, width]."""
        if not len(numbers):
            return
        rows = numbers.reshape(len(numbers), -1)
        with np.errstate(over="ignore", invalid="ignore"):  # numbers too large are told later
            mean = rows.mean(0)
            squares = ((rows - mean) ** 2).sum(0)
            total, distance = self.count + len(rows), mean - self.mean
            self.squares = self.squares + squares + distance**2 * self.count * len(rows) / total
            self.mean = self.mean + distance * len(rows) / total if self.count else mean
        self.low = np.minimum(self.low, rows.min(0))
        self.high = np.maximum(self.high, rows.max(0))
        self.count = total

    @property
    def deviation(self) -> NDArray[np.float64]:
        """Root of the mean squared distance; 1 for what is constant, which becomes 0."""
        if not self.count:
            return np.ones_like(self.mean)
        found = np.sqrt(self.squares / self.count)
        largest = np.maximum(np.abs(self.low), np.abs(self.high))
        return np.where(found <= 1e-12 * largest, 1.0, found)

    def profile(self) -> Profile:
        """Count, mean, deviation and range, over all positions."""
        if not self.count:
            return {"count": 0}
        mean, width = float(self.mean.mean()), len(self.mean)
        between = self.count * float(((self.mean - mean) ** 2).sum())
        spread = math.sqrt((float(self.squares.sum()) + between) / (self.count * width))
        return {
            "count": self.count * width, "mean": mean, "deviation": spread,
            "min": float(self.low.min()), "max": float(self.high.max()),
        }  # fmt: skip


def _plainly(values: NDArray[np.float64]) -> Any:
    """One number, or a tuple of them by position."""
    return float(values[0]) if len(values) == 1 else tuple(values.tolist())


class Numbers:
    """Numbers: alone, in tensors, or in lists.

    Vectors have statistics for each of their positions, and so have lists that turn out to have
    one size in all training rows: they are vectors.
    """

    def __init__(self, made: Field, scale: Scale, where: str, unless_binary: bool = False) -> None:
        self.made, self.scale, self.where = made, scale, where
        self.unless_binary = unless_binary
        """Whether a column of 0 and 1 only is no amount, and is not scaled."""
        self.raw, self.scaled = Moments(), Moments()
        self.width = made.shape[0] if len(made.shape) == 1 and made.kind == "tensor" else None
        self.by_position: tuple[Moments, Moments] | None = None
        self.fills_with_mean, self.is_binary = made.fill == MEAN, True

    def add(self, column: Any, named: Named) -> None:
        values, offsets = flat(column) if self.made.kind != "number" else (plain(column), None)
        numbers = columns.numbers_of(values, self.where)
        if self.made.fill is not None and not self.fills_with_mean:
            numbers = np.where(np.isnan(numbers), self.made.fill, numbers)
        known = numbers[~np.isnan(numbers)]
        self.is_binary = self.is_binary and bool(((known == 0) | (known == 1)).all())
        is_first = not self.raw.count
        self.raw.add(known)
        logs = known
        if self.scale == "log":
            by_row = named if self.made.kind == "number" else _item
            logs = columns.with_log(numbers, self.where, by_row)[~np.isnan(numbers)]
            self.scaled.add(logs)
        if offsets is not None and self.made.kind == "series":
            lengths = set(np.diff(offsets).tolist())
            if is_first and len(lengths) == 1:
                self.width = lengths.pop() or None
            elif lengths - {self.width}:
                self.width = None
        if self.width is None or len(known) < len(numbers) or not len(known):
            self.by_position = None if self.width is None else self.by_position
            return  # a list with a gap is refused, when all have been counted
        if self.by_position is None:
            self.by_position = Moments(self.width), Moments(self.width)
        for moments, part in zip(self.by_position, (known, logs), strict=True):
            moments.add(part.reshape(-1, self.width))

    def field(self) -> Field:
        if not self.raw.count and self.made.kind == "number":
            raise DataError(f"{self.where}: every value is missing in the training rows")
        made, raw, scaled = self.made, self.raw, self.scaled
        if made.kind == "series" and self.width is not None:
            made = replace(made, kind="tensor", shape=(self.width,))
        if self.by_position is not None and self.scale != "shared":
            raw, scaled = self.by_position
        made = replace(made, center=_plainly(raw.mean))
        if self.fills_with_mean:
            made = replace(made, fill=float(self.raw.mean[0]))
        if made.is_target and made.kind == "number" and self.is_binary:
            ones = round(float(self.raw.mean[0]) * self.raw.count)
            made = replace(made, counts=(self.raw.count - ones, ones))
        is_amount = not (self.unless_binary and self.is_binary)
        if not raw.count or self.scale == "none" or not is_amount:
            return made
        known = scaled if self.scale == "log" else raw
        if not np.isfinite(known.deviation).all():
            largest = max(abs(self.raw.low[0]), abs(self.raw.high[0]))
            raise DataError(f"{self.where} holds numbers too large to scale, up to {largest:g}")
        mean, deviation = known.mean, known.deviation
        if self.scale == "min_max":
            span = known.high - known.low
            mean, deviation = known.low, np.where(span == 0, 1.0, span)
        return replace(
            made, mean=_plainly(mean), deviation=_plainly(deviation), log=self.scale == "log"
        )

    def profile(self) -> Profile:
        return self.raw.profile()


def _item(place: int) -> str:
    return f"of list item {place}"


class Dates:
    """Dates and times."""

    def __init__(self, made: Field) -> None:
        self.made, self.days = made, Moments()

    def add(self, column: Any, named: Named) -> None:
        self.days.add(columns.days_of(column))

    def field(self) -> Field:
        mean, deviation = _plainly(self.days.mean), _plainly(self.days.deviation)
        return replace(self.made, mean=mean, deviation=deviation)

    def profile(self) -> Profile:
        found = self.days.profile()
        return {key: found[key] for key in ("count", "min", "max") if key in found}


class Categories:
    """Distinct values, and how often each stands in the training rows."""

    def __init__(self, made: Field, where: str) -> None:
        self.made, self.where = made, where
        self.counts: Counter[Any] = Counter()

    def add(self, column: Any, named: Named) -> None:
        values = plain(column) if self.made.kind == "category" else flat(column)[0]
        if not (pa.types.is_integer(values.type) or is_named(values.type)):
            raise DataError(
                f"{self.where} is {values.type}, but is read as classes: "
                "store it as whole numbers or text"
            )
        counted = pc.value_counts(columns.filled(self.made, values).drop_null())
        both = (counted.field("values").to_pylist(), counted.field("counts").to_pylist())
        self.counts.update(dict(zip(*both, strict=True)))
        if len(self.counts) > LARGEST_VOCABULARY:
            raise DataError(
                f"{self.where} has more than {LARGEST_VOCABULARY} distinct values: not a category"
            )

    def field(self) -> Field:
        known = sorted(value for value in self.counts if value != self.made.ignored)
        if self.made.kind == "tokens":
            number = len(known) + (0 if self.made.is_target else 1)
            return replace(self.made, vocabulary=tuple(known), num_tokens=number)
        counts = tuple(self.counts[value] for value in known) if self.made.is_target else None
        return replace(self.made, vocabulary=tuple(known), counts=counts)

    def profile(self) -> Profile:
        total = sum(self.counts.values())
        first = {str(value): count for value, count in self.counts.most_common(20)}
        return {"count": total, "distinct": len(self.counts), "most_common": first}


class ClassNumbers:
    """Whole numbers that count from 0: tokens, and tensors of labels."""

    def __init__(self, made: Field, where: str) -> None:
        self.made, self.where = made, where
        self.highest, self.count = 0, 0

    def add(self, column: Any, named: Named) -> None:
        numbers = flat(column)[0].to_numpy(zero_copy_only=False)
        if self.made.ignored is not None:
            numbers = numbers[numbers != self.made.ignored]
        if not len(numbers):
            return
        if numbers.min() < 0 or (numbers != numbers.astype(np.int64)).any():
            raise DataError(
                f"{self.where} holds {numbers.min()}: class numbers and tokens count from 0"
            )
        self.highest, self.count = max(self.highest, int(numbers.max())), self.count + len(numbers)

    def field(self) -> Field:
        return replace(self.made, num_tokens=self.highest + 1)

    def profile(self) -> Profile:
        return {"items": self.count, "highest": self.highest}


class Images:
    """Encoded images, of which only the headers are read."""

    def __init__(self, made: Field, where: str) -> None:
        self.made, self.where = made, where
        self.sizes: Counter[str] = Counter()

    def add(self, column: Any, named: Named) -> None:
        from PIL import Image

        for row, content in enumerate(plain(column)):
            try:
                with Image.open(io.BytesIO(content.as_py())) as image:
                    if image.mode[0] in "IF":
                        raise DataError(
                            f"{self.where}: the image in row {named(row)} (counted from 0) has "
                            f"numbers of mode {image.mode}; expected 8 bits for each colour"
                        )
                    self.sizes[f"{image.height} x {image.width} {image.mode}"] += 1
            except (OSError, SyntaxError, Image.DecompressionBombError):
                bad = np.arange(len(column)) == row
                fix = "expected PNG, JPEG or another format that Pillow reads"
                columns.refuse_rows(bad, self.where, "rows that are no image", fix, named)

    def field(self) -> Field:
        return self.made

    def profile(self) -> Profile:
        return {"count": self.sizes.total(), "sizes": dict(self.sizes.most_common(20))}


class Known:
    """A column that the spec alone describes."""

    def __init__(self, made: Field) -> None:
        self.made = made

    def add(self, column: Any, named: Named) -> None:
        pass

    def field(self) -> Field:
        return self.made

    def profile(self) -> Profile:
        return {}


class Weights:
    """Numbers that say how much each row counts."""

    def __init__(self, made: Field, where: str) -> None:
        self.made, self.where, self.moments = made, where, Moments()

    def add(self, column: Any, named: Named) -> None:
        numbers = columns.numbers_of(plain(column), self.where)
        if self.made.fill is not None:
            numbers = np.where(np.isnan(numbers), self.made.fill, numbers)
        negative = np.flatnonzero(numbers < 0)
        if len(negative):
            first = int(negative[0])
            raise DataError(
                f"{self.where}: {numbers[first]:g} in row {named(first)} (counted from 0), "
                "weights are at least 0"
            )
        self.moments.add(numbers)

    def field(self) -> Field:
        if self.moments.count and self.moments.high[0] == 0:
            raise DataError(f"{self.where}: every weight is 0")
        return self.made

    def profile(self) -> Profile:
        return self.moments.profile()


def is_named(kind: pa.DataType) -> bool:
    types = pa.types
    tests = (types.is_boolean, types.is_string, types.is_large_string, types.is_string_view)
    return any(test(kind) for test in tests)
