"""What the training rows say about each column, block by block: the fields, and their profile.

Blocks are cut by row numbers alone, so that sums over them are the same for any layout of files.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.data import columns
from pipeline.data.arrow import flat, kind_of, missing, plain, unreadable
from pipeline.data.columns import Field, Named, Reading
from pipeline.data.source import Block, Source, in_memory
from pipeline.dataspec import Constant, Data, Scale
from pipeline.errors import DataError

LARGEST_VOCABULARY = 100_000
NUMERIC = ("number", "tensor", "series")
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


class _Numbers:
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


class _Dates:
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


class _Categories:
    """Distinct values, and how often each stands in the training rows."""

    def __init__(self, made: Field, where: str) -> None:
        self.made, self.where = made, where
        self.counts: Counter[Any] = Counter()

    def add(self, column: Any, named: Named) -> None:
        values = plain(column) if self.made.kind == "category" else flat(column)[0]
        if not (pa.types.is_integer(values.type) or _is_named(values.type)):
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


class _ClassNumbers:
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


class _Images:
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


class _Known:
    """A column that the spec alone describes."""

    def __init__(self, made: Field) -> None:
        self.made = made

    def add(self, column: Any, named: Named) -> None:
        pass

    def field(self) -> Field:
        return self.made

    def profile(self) -> Profile:
        return {}


class _Weights:
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


def _is_named(kind: pa.DataType) -> bool:
    types = pa.types
    tests = (types.is_boolean, types.is_string, types.is_large_string, types.is_string_view)
    return any(test(kind) for test in tests)


def fits(data: Data, source: Source, readings: Mapping[str, Reading], base: Path) -> dict[str, Fit]:
    """An empty fit for each input, target and weight, by the name of its field.

    Raises DataError with every column of which nothing can be made, and with what else is wrong in
    the first rows.
    """
    kinds = {field.name: field.type for field in source.schema}
    makers: dict[str, Callable[[], Fit]] = {
        name: partial(_of_input, data, name, kinds[name], base, source) for name in source.inputs
    }
    for name in data.targets:
        stored = data.shift.get(name, name)
        reading = readings.get(name, Reading())
        makers[name] = partial(_of_target, data, name, stored, reading, kinds[stored], source)
    if data.sample_weight is not None:
        name = data.sample_weight.column
        makers[name] = partial(_of_weight, data, name, kinds[name], source)
    made: dict[str, Fit] = {}
    faults = []
    for name, make in makers.items():
        try:
            made[name] = make()
        except DataError as fault:
            faults.append(str(fault))
    if faults:
        odd = Faults()
        block = next(source.blocks(), None)
        if block is None:
            raise DataError(f"{source.key}: no rows in {source.shown}")
        kept(data, source, made, block, odd)
        raise DataError("\n  ".join(dict.fromkeys([*faults, *odd.lines])))
    return made


def fitted(data: Data, table: pa.Table, readings: Mapping[str, Reading]) -> list[Field]:
    """Fields of a table in memory, all of whose rows are for training."""
    source = in_memory(data, table)
    made, faults = fits(data, source, readings, Path()), Faults()
    for block in source.blocks():
        kept(data, source, made, block, faults)
        faults.refuse()
        for name, fit in made.items():
            fit.add(block.table[data.shift.get(name, name)], block.named)
    return [fit.field() for fit in made.values()]


def _of_input(data: Data, name: str, kind: pa.DataType, base: Path, source: Source) -> Fit:
    where, types = source.where(name), pa.types
    if name in data.dates:
        if not (types.is_timestamp(kind) or types.is_date(kind)):
            raise DataError(f"data.dates: column {name!r} is {kind}, expected dates or times")
        parts = tuple(p for p in data.parts_of(name) if p != "day" or types.is_timestamp(kind))
        if not data.parts_of(name):
            raise DataError(f"data.dates.{name}: no parts; take elapsed, year, week or day")
        if not parts:
            raise DataError(f"data.dates.{name}: column is {kind}, with no time of day in it")
        size = sum(1 if part == "elapsed" else 2 for part in parts)
        made = Field(name, "date", str(kind), shape=(size,), parts=parts)
        return _Dates(_with_policy(made, data, name, where))
    if name in data.images:
        if not (types.is_binary(kind) or types.is_large_binary(kind)):
            raise DataError(f"data.images: column {name!r} is {kind}, expected encoded images")
        image = data.images[name]
        shape = tuple(image.size) if image.mode == "L" else (3, *image.size)
        made = Field(name, "image", str(kind), shape=shape)
        return _Images(_with_policy(made, data, name, where), where)
    if name in data.tokenizers:
        if not _is_named(kind) or types.is_boolean(kind):
            raise DataError(f"data.tokenizers: column {name!r} is {kind}, expected text")
        content = _tokenizer(name, base / Path(data.tokenizers[name]).expanduser())
        number = max(columns.tokenizer_of(content).get_vocab().values(), default=0) + 1
        made = Field(name, "tokens", str(kind), num_tokens=number, tokenizer=content)
        return _Known(_with_policy(made, data, name, where))
    read, shape = kind_of(kind, where)
    if name in data.categorical:
        if read not in columns.SINGLE:
            raise DataError(f"{where} is {kind}: only single values can be categorical")
        read = "category"
    if isinstance(data.scale, dict) and name in data.scale and read not in NUMERIC:
        raise DataError(f"data.scale.{name}: {where} is {kind}, read as {read}: not to be scaled")
    made = _with_policy(Field(name, read, str(kind), shape=shape), data, name, where, kind)
    return _fit(made, data.scale_of(name), where, kind)


def _tokenizer(column: str, path: Path) -> str:
    """The file's content, once it is known to be a tokenizer's."""
    where = f"data.tokenizers.{column}: {path}"
    try:
        content = path.read_text(encoding="utf-8")
        columns.tokenizer_of(content)
    except OSError as error:
        raise DataError(f"{where} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{where} is no tokenizer.json: {error}") from None
    return content


def _of_target(
    data: Data, name: str, stored: str, reading: Reading, kind: pa.DataType, source: Source
) -> Fit:
    where = source.where(stored) if name == stored else f"data.target: column {stored!r}"
    read, shape = kind_of(kind, where)
    if reading.as_classes:
        read = {"number": "category", "tensor": "labels"}.get(read, read)  # type: ignore[assignment]
    ignored = reading.ignored if reading.as_classes else None
    made = Field(name, read, str(kind), is_target=True, shape=shape, ignored=ignored)
    scale = data.target_scale if reading.as_amounts else "none"
    return _fit(_with_policy(made, data, stored, where, kind), scale, where, kind)


def _of_weight(data: Data, name: str, kind: pa.DataType, source: Source) -> Fit:
    where = source.where(name)
    if kind_of(kind, where)[0] != "number":
        raise DataError(f"{where} is {kind}, expected numbers")
    made = Field(name, "number", str(kind), is_weight=True)
    return _Weights(_with_policy(made, data, name, where), where)


def _fit(made: Field, scale: Scale, where: str, kind: pa.DataType) -> Fit:
    if made.kind == "category":
        return _Categories(made, where)
    if made.kind == "tokens" and not pa.types.is_integer(kind.value_type):
        return _Categories(made, where)
    if made.kind in ("tokens", "labels"):
        return _ClassNumbers(made, where)
    return _Numbers(made, scale, where)


def _with_policy(
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

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, list[str]] = field(default_factory=dict)

    def add(self, what: str, bad: NDArray[np.bool_], named: Named) -> None:
        """Take in the bad rows of some rows."""
        found = np.flatnonzero(bad)
        if len(found):
            self.counts[what] = self.counts.get(what, 0) + len(found)
            kept = self.first.setdefault(what, [])
            kept += [named(int(row)) for row in found[: columns.FIRST_ROWS - len(kept)]]

    @property
    def lines(self) -> list[str]:
        """One for each column and what is wrong in it."""
        return [
            f"{what.format(count)}, first at row {', '.join(self.first[what])} (counted from 0)"
            for what, count in self.counts.items()
        ]

    def refuse(self) -> None:
        """Raise DataError with all of them, if there are any."""
        if self.lines:
            raise DataError(
                "\n  ".join(self.lines)
                + "\n  mend the file, or say in data.missing what becomes of missing values: drop "
                "(the row), mean (numbers), category (of its own), or {constant: value}"
            )


def kept(data: Data, source: Source, made: Mapping[str, Fit], block: Block, faults: Faults) -> Any:
    """True for each row of the block that is not dropped, or None for all of them.

    Missing values that have no policy, and values that are none, are added to `faults`.
    """
    keep = np.ones(len(block.table), bool)
    stored_in: dict[str, list[Field]] = {}
    for name, fit in made.items():
        stored_in.setdefault(data.shift.get(name, name), []).append(fit.made)
    odd: list[tuple[str, NDArray[np.bool_]]] = []
    for column in source.wanted:
        values, where = block.table[column], source.where(column)
        empty = missing(values)
        is_dropped = data.missing_in(column) == "drop"
        if is_dropped:
            keep &= ~empty
        if column not in stored_in:  # it only tells where rows belong
            continue
        if not is_dropped and not all(_has_value(one) for one in stored_in[column]):
            odd.append((f"{where}: {{}} missing values", empty))
        bad = unreadable(values)
        odd.append((f"{where}: {{}} rows with infinity, or NaN or nothing inside a list", bad))
    for what, bad in odd:
        faults.add(what, bad & keep, block.named)
    return None if keep.all() else keep


def _has_value(made: Field) -> bool:
    """Whether missing values have a place."""
    return made.fill is not None or made.has_missing


__all__ = ["Faults", "Fit", "Moments", "Profile", "fits", "fitted", "kept"]
