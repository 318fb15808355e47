"""Columns of dates and times."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.arrow import is_text, plain
from pipeline.data.columns.base import ColumnError, Encoded, Field, Profile, Statistics
from pipeline.data.columns.moments import Moments
from pipeline.data.columns.numbers import narrowed
from pipeline.spec.data import DatePart, Scale


@dataclass(frozen=True)
class Date(Field):
    """A date or time: float [N, K], one number for the days elapsed, two for each cycle."""

    mean: float = 0.0
    """The mean of the days elapsed since 1970."""
    deviation: float = 1.0
    parts: tuple[DatePart, ...] = ()

    kind: ClassVar[str] = "date"
    is_cell: ClassVar[bool] = True

    @classmethod
    def from_parts(cls, name: str, arrow_type: pa.DataType, parts: Sequence[DatePart]) -> Date:
        """The column of which these parts are read, as far as its type has them.

        Raises ColumnError, which continues the key of the parts, when none is left.
        """
        if not parts:
            raise ColumnError("has no parts; take elapsed, year, week or day")
        has_time = pa.types.is_timestamp(arrow_type)
        held = tuple(part for part in parts if has_time or part != "day")
        if not held:
            raise ColumnError(f"reads the day of a column of {arrow_type}, which has no time")
        width = sum(1 if part == "elapsed" else 2 for part in held)
        return cls(name, str(arrow_type), shape=(width,), parts=held)

    def statistics(self, scale: Scale = "none", unless_binary: bool = False) -> Statistics:
        return DateStatistics(self)

    def encode(self, column: Any, dtype: np.dtype[Any]) -> Encoded:
        days = days_since_1970(column)
        years = np.floor(days).astype("datetime64[D]").astype("datetime64[Y]")
        starts, ends = (y.astype("datetime64[D]").astype(np.float64) for y in (years, years + 1))
        phases = {
            "year": (days - starts) / (ends - starts),
            "week": (days + 3) % 7 / 7,  # 1970 began on a Thursday
            "day": days % 1,
        }
        columns = []
        for part in self.parts:
            if part == "elapsed":
                columns.append((days - self.mean) / self.deviation)
            else:
                angle = 2 * math.pi * phases[part]
                columns += [np.sin(angle), np.cos(angle)]
        return narrowed(np.stack(columns, axis=1), dtype)

    def from_cells(self, cells: Any) -> Any:
        if not is_text(cells.type) and getattr(cells.type, "tz", None) is None:
            return super().from_cells(cells)
        for arrow_type in (
            pa.timestamp("us"),
            pa.timestamp("us", "UTC"),
        ):  # without a zone or with
            with contextlib.suppress(pa.ArrowException):
                return cells.cast(arrow_type, safe=False).cast(pa.timestamp("us"))  # in UTC
        raise ColumnError(f"holds text that is not a date, such as {cells.drop_null()[0]}")

    @property
    def empty_type(self) -> pa.DataType:
        return pa.timestamp("us")


class DateStatistics(Statistics):
    """Mean and spread of dates and times."""

    field: Date

    def __init__(self, field: Date) -> None:
        super().__init__(field)
        self.days = Moments()

    def observe(self, column: Any) -> None:
        self.days.add(days_since_1970(column))

    def fit(self) -> Field:
        mean = float(self.days.mean[0])
        deviation = float(self.days.deviation[0])
        return replace(self.field, mean=mean, deviation=deviation)

    def profile(self) -> Profile:
        profile = self.days.profile()
        return {key: profile[key] for key in ("count", "min", "max") if key in profile}


def days_since_1970(column: Any) -> NDArray[np.float64]:
    """Days since 1970, in UTC, with the time of day as their fraction."""
    values = plain(column)
    if pa.types.is_timestamp(values.type):
        try:
            is_finer = values.type.unit == "ns"
            instants = values.cast(pa.timestamp("us"), safe=not is_finer).view(pa.int64())
        except pa.ArrowException:
            problem = "holds times more than 292,000 years away, which microseconds cannot count"
            raise ColumnError(problem, "look for times in another unit") from None
        return np.asarray(instants.to_numpy(zero_copy_only=False), np.float64) / 86_400e6
    days = values.cast(pa.date32()).view(pa.int32())
    return np.asarray(days.to_numpy(zero_copy_only=False), np.float64)
