"""What the training rows say about a column of each kind, block by block."""

from __future__ import annotations

import io
import math
from collections import Counter
from dataclasses import dataclass, replace
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


@dataclass
class Moments:
    """Mean, deviation and range of numbers that come in parts (Chan et al., 1979)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of the squared distances from the mean."""
    low: float = math.inf
    high: float = -math.inf

    def add(self, numbers: NDArray[np.float64]) -> None:
        """Take in some numbers."""
        if not len(numbers):
            return
        with np.errstate(over="ignore", invalid="ignore"):  # numbers too large are told later
            mean = float(numbers.mean())
            squares = float(((numbers - mean) ** 2).sum())
        self.low = min(self.low, float(numbers.min()))
        self.high = max(self.high, float(numbers.max()))
        total, distance = self.count + len(numbers), mean - self.mean
        self.squares += squares + distance**2 * self.count * len(numbers) / total
        self.mean = self.mean + distance * len(numbers) / total if self.count else mean
        self.count = total

    @property
    def deviation(self) -> float:
        """Root of the mean squared distance; 1 for a constant column, which becomes 0."""
        found = math.sqrt(self.squares / self.count) if self.count else 1.0
        return 1.0 if found <= 1e-12 * max(abs(self.low), abs(self.high)) else found

    def profile(self) -> Profile:
        """Count, mean, deviation and range."""
        if not self.count:
            return {"count": 0}
        spread = math.sqrt(self.squares / self.count)
        return {
            "count": self.count, "mean": self.mean, "deviation": spread,
            "min": self.low, "max": self.high,
        }  # fmt: skip


class Numbers:
    """Numbers: alone, in tensors, or in lists."""

    def __init__(self, made: Field, scale: Scale, where: str) -> None:
        self.made, self.scale, self.where = made, scale, where
        self.raw, self.scaled = Moments(), Moments()
        self.fills_with_mean = made.fill == MEAN

    def add(self, column: Any, named: Named) -> None:
        values = plain(column) if self.made.kind == "number" else flat(column)[0]
        numbers = columns.numbers_of(values, self.where)
        if self.made.fill is not None and not self.fills_with_mean:
            numbers = np.where(np.isnan(numbers), self.made.fill, numbers)
        is_there = ~np.isnan(numbers)
        self.raw.add(numbers[is_there])
        if self.scale == "log":
            by_row = named if self.made.kind == "number" else _item
            self.scaled.add(columns.with_log(numbers, self.where, by_row)[is_there])

    def field(self) -> Field:
        if not self.raw.count and self.made.kind == "number":
            raise DataError(f"{self.where}: every value is missing in the training rows")
        made = replace(self.made, center=self.raw.mean)
        if self.fills_with_mean:
            made = replace(made, fill=self.raw.mean)
        if not self.raw.count or self.scale == "none":
            return made
        known = self.scaled if self.scale == "log" else self.raw
        if not math.isfinite(known.deviation):
            largest = max(abs(known.low), abs(known.high))
            raise DataError(f"{self.where} holds numbers too large to scale, up to {largest:g}")
        if self.scale == "min_max":
            return replace(made, mean=known.low, deviation=(known.high - known.low) or 1.0)
        is_log = self.scale == "log"
        return replace(made, mean=known.mean, deviation=known.deviation, log=is_log)

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
        return replace(self.made, mean=self.days.mean, deviation=self.days.deviation)

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
        if self.moments.count and self.moments.high == 0:
            raise DataError(f"{self.where}: every weight is 0")
        return self.made

    def profile(self) -> Profile:
        return self.moments.profile()


def is_named(kind: pa.DataType) -> bool:
    types = pa.types
    tests = (types.is_boolean, types.is_string, types.is_large_string, types.is_string_view)
    return any(test(kind) for test in tests)
