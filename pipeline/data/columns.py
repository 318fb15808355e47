"""One column: its raw values, what the training rows say about it, and the numbers it becomes."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.data.arrow import Kind, flat, missing, plain, unreadable
from pipeline.errors import DataError
from pipeline.registry import nearest

IGNORED = -100
"""Encoded class number of an item that is left out: no class can have it."""
UNKNOWN = 0
"""Code of an input category that no training row has; known ones count from 1."""
SINGLE = ("number", "category")
"""Kinds of columns whose rows hold one value."""
FIRST_ROWS = 5
"""How many rows an error names."""


@dataclass(frozen=True)
class Field:
    """One column: how its raw values become tensors, fitted on the training rows."""

    name: str
    kind: Kind
    arrow_type: str
    is_target: bool = False
    mean: float | tuple[float, ...] = 0.0
    """What is taken off each number, after the logarithm if there is one; of vectors by position,
    unless their scale is `shared`."""
    deviation: float | tuple[float, ...] = 1.0
    """What the rest is divided by."""
    vocabulary: tuple[Any, ...] | None = None
    """Distinct training values in sorted order: categories, and tokens that are text."""
    counts: tuple[int, ...] | None = None
    """Training rows of each vocabulary entry, for targets; of 0 and 1 where a target of numbers
    holds nothing else."""
    shape: tuple[int, ...] = ()
    num_tokens: int = 0
    """Tokens or class numbers, counted from 0, of lists and tensors of labels."""
    ignored: int | None = None
    """A raw class number that marks items to leave out; encoded as IGNORED, it is no class."""
    center: float | tuple[float, ...] = 0.0
    """Mean of the training rows in the column's own unit, whether it is scaled by it or not."""
    is_weight: bool = False
    """Neither input nor target: how much each row counts."""
    fill: Any = None
    """Raw value in the place of missing ones, if they have one."""
    has_missing: bool = False
    """Whether missing is a category of its own, the last one."""
    log: bool = False
    """Whether log(1 + x) is taken before anything else."""
    parts: tuple[str, ...] = ()
    """What is taken of a date."""
    tokenizer: str = ""
    """Content of the tokenizer file that makes tokens of text."""

    @property
    def is_input(self) -> bool:
        """Whether the model reads it."""
        return not (self.is_target or self.is_weight)

    @property
    def key(self) -> str:
        """Where the spec names it."""
        return "data." + (
            "target" if self.is_target else "sample_weight" if self.is_weight else "inputs"
        )

    @property
    def num_codes(self) -> int:
        """How many codes a category or token can have, unknown and missing included."""
        if self.kind in ("tokens", "labels"):
            return self.num_tokens
        return len(self.vocabulary or ()) + (0 if self.is_target else 1) + self.has_missing

    @property
    def is_optional(self) -> bool:
        """Whether rows without a value can be read."""
        return self.fill is not None or self.has_missing

    @property
    def is_list(self) -> bool:
        """Whether rows have different sizes."""
        return self.kind in ("tokens", "series", "image")

    def to_json(self) -> dict[str, Any]:
        """Plain values, to travel with the model."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Field:
        """The inverse of `to_json`."""
        tuples: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in value.items()
        }
        return cls(**tuples)


@dataclass(frozen=True)
class Reading:
    """How the losses read a target column."""

    as_classes: bool = False
    as_amounts: bool = True
    """Only amounts are scaled."""
    ignored: int | None = None
    is_declared: bool = True
    """Whether the losses say what they read; else a column of 0 and 1 only is no amount."""


@dataclass(frozen=True)
class Pieces:
    """A list column of some rows: `values` [total], `lengths` int64 [N]."""

    values: NDArray[Any]
    lengths: NDArray[np.int64]


Encoded = NDArray[Any] | Pieces
"""A column's rows: [N, *shape], or pieces of different lengths."""
Named = Callable[[int], str]
"""What a row is called in messages."""


def stored_type(field: Field, fraction: type[np.floating[Any]]) -> np.dtype[Any]:
    """The type that a column's values are kept in: the smallest that holds each code."""
    if field.kind == "image":
        return np.dtype(np.uint8)
    if field.kind not in ("category", "tokens", "labels"):
        return np.dtype(fraction)
    sizes = (np.int8, np.int16, np.int32, np.int64)
    return np.dtype(next(size for size in sizes if field.num_codes <= np.iinfo(size).max))


def refuse_rows(bad: NDArray[np.bool_], where: str, what: str, fix: str, named: Named) -> None:
    """Raise DataError with the number of bad rows and the first of them."""
    if bad.any():
        first = ", ".join(named(int(row)) for row in np.flatnonzero(bad)[:FIRST_ROWS])
        raise DataError(
            f"{where}: {int(bad.sum())} {what}, first at row {first} (counted from 0); {fix}"
        )


def encode(
    fields: list[Field],
    table: pa.Table,
    shift: Mapping[str, str] | None = None,
    fraction: type[np.floating[Any]] = np.float32,
    named: Named = str,
) -> dict[str, Encoded]:
    """The table's rows as the steps read them, fractions as `fraction`.

    Raises DataError naming column, value and first row.
    """
    return {field.name: _encode(field, table, shift or {}, fraction, named) for field in fields}


def _encode(
    field: Field, table: pa.Table, shift: Mapping[str, str],
    fraction: type[np.floating[Any]], named: Named,
) -> Encoded:  # fmt: skip
    stored = shift.get(field.name, field.name)
    where = f"{field.key}: column {stored!r}"
    column, kind = plain(table[stored]), stored_type(field, fraction)
    if field.kind != "category" or field.is_target:
        empty = missing(column) if field.fill is None else np.zeros(len(column), bool)
        refuse_rows(empty, where, "missing values", "fill them in first", named)
        bad, what = unreadable(column), "rows with NaN, infinity or a missing item"
        refuse_rows(bad, where, what, "mend or drop them first", named)
    if field.kind == "category":
        return _codes(field, column, where, named).astype(kind)
    if field.kind == "date":
        return _narrowed(_of_dates(field, column), kind, where)
    if field.kind == "image":
        return _bytes(column)
    if field.tokenizer:
        return _tokenized(field, column, kind)
    values, offsets = flat(column)
    if field.kind == "tokens":
        if field.vocabulary is None:
            codes = _class_numbers(field, values, where)
        else:
            codes = _codes(field, values, where, str)
        pieces = Pieces(codes.astype(kind), np.diff(offsets))
        return _next_items(pieces) if field.name in shift else pieces
    if field.kind == "labels":
        return _class_numbers(field, values, where).reshape(-1, *field.shape).astype(kind)
    scaled = _scaled(field, column if field.kind == "number" else values, where, named)
    if field.kind == "series":
        return Pieces(_narrowed(scaled, kind, where), np.diff(offsets))
    if len(scaled) != len(column) * math.prod(field.shape):
        raise DataError(f"{where}: expected {field.shape} numbers in each row")
    return _narrowed(scaled.reshape(len(column), *field.shape), kind, where)


def _narrowed(numbers: NDArray[np.float64], kind: np.dtype[Any], where: str) -> NDArray[Any]:
    """The numbers in the type that they are kept in. Raises DataError for one it cannot hold."""
    with np.errstate(over="ignore"):
        made = numbers.astype(kind)
    if not np.isfinite(made).all():
        largest = np.abs(numbers).max()
        raise DataError(
            f"{where}: {largest:g}, after scaling, is beyond what {kind} holds; "
            "scale the column, or set training.precision: float64"
        )
    return made


def numbers_of(values: Any, where: str) -> NDArray[np.float64]:
    """Numbers as float64, NaN where there is none. Raises DataError for text, and beyond 2^53."""
    types = pa.types
    if not (
        types.is_floating(values.type)
        or types.is_integer(values.type)
        or types.is_decimal(values.type)
        or types.is_boolean(values.type)
    ):
        raise DataError(f"{where} is {values.type}, expected numbers")
    numbers = np.asarray(values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False))
    if (
        types.is_integer(values.type)
        and len(numbers)
        and np.nanmax(abs(numbers), initial=0) > 2**53
    ):
        raise DataError(
            f"{where} holds whole numbers beyond 2^53, which floats cannot tell apart; "
            "if they are names, list the column in data.categorical"
        )
    return numbers


def with_log(numbers: NDArray[np.float64], where: str, named: Named) -> NDArray[np.float64]:
    """log(1 + x) of each number. Raises DataError for numbers of -1 and less."""
    fix = "data.scale: log is for numbers above -1"
    refuse_rows(numbers <= -1, where, "numbers of -1 or less", fix, named)
    return np.log1p(numbers)


def _scaled(field: Field, values: Any, where: str, named: Named) -> NDArray[np.float64]:
    numbers = numbers_of(values, where)
    if field.fill is not None:
        numbers = np.where(np.isnan(numbers), field.fill, numbers)
    if field.log:
        numbers = with_log(numbers, where, named)
    if isinstance(field.mean, tuple):  # one for each position; rows of another size are refused
        if len(numbers) % len(field.mean):
            raise DataError(f"{where}: expected {len(field.mean)} numbers in each row")
        numbers = numbers.reshape(-1, len(field.mean))
    return np.asarray((numbers - field.mean) / field.deviation).reshape(-1)


def days_of(column: Any) -> NDArray[np.float64]:
    """Days since 1970, in UTC, with the time of day as their fraction."""
    values = plain(column)
    if pa.types.is_timestamp(values.type):
        instants = values.cast(pa.timestamp("us"), safe=False).view(pa.int64())
        return np.asarray(instants.to_numpy(zero_copy_only=False), np.float64) / 86_400e6
    whole = values.cast(pa.date32()).view(pa.int32())
    return np.asarray(whole.to_numpy(zero_copy_only=False), np.float64)


def _of_dates(field: Field, column: Any) -> NDArray[np.float64]:
    """Days gone by, scaled; sine and cosine of the place in the year, the week and the day."""
    days = days_of(column)
    years = np.floor(days).astype("datetime64[D]").astype("datetime64[Y]")
    starts, ends = (y.astype("datetime64[D]").astype(np.float64) for y in (years, years + 1))
    places = {
        "year": (days - starts) / (ends - starts),
        "week": (days + 3) % 7 / 7,  # 1970 began on a Thursday
        "day": days % 1,
    }
    found = []
    for part in field.parts:
        if part == "elapsed":
            found.append((days - field.mean) / field.deviation)
        else:
            angle = 2 * math.pi * places[part]
            found += [np.sin(angle), np.cos(angle)]
    return np.stack(found, axis=1)


def _bytes(column: Any) -> Pieces:
    """Encoded images as they are; the feed decodes them."""
    whole = column.cast(pa.large_binary())
    _, offsets, values = whole.buffers()
    ends = np.frombuffer(offsets, np.int64)[whole.offset : whole.offset + len(whole) + 1]
    found = np.frombuffer(values, np.uint8) if values is not None else np.zeros(0, np.uint8)
    return Pieces(found[ends[0] : ends[-1]], np.diff(ends))


def decoded(field: Field, content: NDArray[np.uint8]) -> NDArray[np.float32]:
    """An encoded image as numbers from -1 to 1: [H, W], or [3, H, W] of colours.

    Raises ValueError for bytes that are no image.
    """
    from PIL import Image

    is_grey = len(field.shape) == 2
    height, width = field.shape[-2:]
    try:
        with Image.open(io.BytesIO(content.tobytes())) as image:
            made = image.convert("L" if is_grey else "RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"no image that can be read: {error}") from None
    if made.size != (width, height):
        made = made.resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(made, np.float32) / np.float32(127.5) - np.float32(1)
    return pixels if is_grey else np.ascontiguousarray(pixels.transpose(2, 0, 1))


@lru_cache(maxsize=4)
def tokenizer_of(content: str) -> Any:
    """The tokenizer that a `tokenizer.json` describes. Raises ValueError if it is none."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise DataError("data.tokenizers: needs a package: pip install tokenizers") from None
    try:
        made = Tokenizer.from_str(content)
    except Exception as error:  # its own errors are bare Exceptions
        raise ValueError(str(error)) from None
    made.no_padding()
    return made


def _tokenized(field: Field, column: Any, kind: np.dtype[Any]) -> Pieces:
    encodings = tokenizer_of(field.tokenizer).encode_batch(column.to_pylist())
    lengths = np.array([len(encoding.ids) for encoding in encodings], np.int64)
    tokens = [token for encoding in encodings for token in encoding.ids]
    return Pieces(np.array(tokens, kind), lengths)


def _class_numbers(field: Field, values: Any, where: str) -> NDArray[np.int64]:
    """Tokens and class numbers as they are, the ignored one as IGNORED; all seen in training."""
    codes = values.to_numpy(zero_copy_only=False).astype(np.int64)
    left_out = codes == field.ignored if field.ignored is not None else np.zeros(len(codes), bool)
    outside = ~left_out & ((codes < 0) | (codes >= field.num_tokens))
    if outside.any():
        raise DataError(
            f"{where}: {codes[outside][0]} is outside 0..{field.num_tokens - 1}, "
            "the range of the training rows"
        )
    return np.where(left_out, IGNORED, codes)


def filled(field: Field, values: Any) -> Any:
    """The column with the field's value in the place of missing ones."""
    if field.fill is None or not values.null_count:
        return values
    if pa.types.is_null(values.type):
        return pa.array([field.fill] * len(values))
    return pc.fill_null(values, pa.scalar(field.fill, values.type))


def _codes(field: Field, values: Any, where: str, named: Named) -> NDArray[np.int64]:
    """Place of each value in the vocabulary, counted from 1 for inputs (0: unknown)."""
    values, known = filled(field, values), field.vocabulary or ()
    try:
        found = pc.index_in(values, pa.array(known, values.type))
    except (pa.ArrowException, OverflowError):  # served values of another type than those trained
        places = {value: place for place, value in enumerate(known)}
        found = pa.array([places.get(value) for value in values.to_pylist()], pa.int32())
    if field.is_target:
        if field.ignored is not None and pa.types.is_integer(values.type):
            left_out = pc.equal(values, field.ignored)
            found = pc.if_else(left_out, pa.scalar(IGNORED, pa.int32()), found)
        unseen = np.flatnonzero(pc.is_null(found).to_numpy(zero_copy_only=False))
        if len(unseen):
            value = values[int(unseen[0])].as_py()
            raise DataError(
                f"{where}: {value!r} in row {named(int(unseen[0]))} is in no training row"
                f"{nearest(value, field.vocabulary or ()) if isinstance(value, str) else ''}"
            )
        return np.asarray(found.to_numpy(zero_copy_only=False).astype(np.int64))
    codes = np.asarray(pc.fill_null(pc.add(found, 1), UNKNOWN).to_numpy().astype(np.int64))
    if field.has_missing:
        codes[missing(values)] = field.num_codes - 1
    return codes


def _next_items(pieces: Pieces) -> Pieces:
    """Each list without its first item: position t's target is item t + 1."""
    starts = np.cumsum(pieces.lengths) - pieces.lengths
    keep = np.ones(len(pieces.values), bool)
    keep[starts[pieces.lengths > 0]] = False
    return Pieces(pieces.values[keep], np.maximum(pieces.lengths - 1, 0))
