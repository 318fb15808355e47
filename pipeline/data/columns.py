"""Column types, preprocessing fitted on the training rows, and the tensors that come of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from pipeline.data.arrow import Kind, flat, kind_of, plain, refuse_missing
from pipeline.data.batch import Batch, Ragged
from pipeline.data.order import Rows
from pipeline.errors import DataError
from pipeline.registry import nearest
from pipeline.spec import Data

LARGEST_VOCABULARY = 100_000
IGNORED = -100
"""Encoded class number of an item that is left out: no class can have it."""
UNKNOWN = 0
"""Code of an input category that no training row has; known ones count from 1."""


@dataclass(frozen=True)
class Field:
    """One column: how its raw values become tensors, fitted on the training rows."""

    name: str
    kind: Kind
    arrow_type: str
    is_target: bool = False
    mean: float = 0.0
    deviation: float = 1.0
    vocabulary: tuple[Any, ...] | None = None
    """Distinct training values in sorted order: categories, and tokens that are text."""
    counts: tuple[int, ...] | None = None
    """Training rows of each vocabulary entry, for targets."""
    shape: tuple[int, ...] = ()
    num_tokens: int = 0
    """Tokens or class numbers, counted from 0, of lists and tensors of labels."""
    ignored: int | None = None
    """A raw class number that marks items to leave out; encoded as IGNORED, it is no class."""
    center: float = 0.0
    """Mean of the training rows in the column's own unit, whether it is scaled by it or not."""
    is_weight: bool = False
    """Neither input nor target: how much each row counts."""

    @property
    def is_input(self) -> bool:
        """Whether the model reads it."""
        return not (self.is_target or self.is_weight)

    @property
    def num_codes(self) -> int:
        """How many codes a category or token can have, unknown included."""
        if self.kind in ("tokens", "labels"):
            return self.num_tokens
        return len(self.vocabulary or ()) + (0 if self.is_target else 1)

    def to_json(self) -> dict[str, Any]:
        """Plain values, to travel with the model."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Field:
        """The inverse of `to_json`."""
        tuples: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in value.items()
        }
        return cls(**tuples)


@dataclass(frozen=True)
class Lists:
    """A list column of all rows: `values` [total], `offsets` int64 [N + 1]."""

    values: Tensor
    offsets: Tensor

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def gather(self, rows: Tensor) -> Ragged:
        """The lists of `rows`, padded with 0 to the longest of them."""
        starts, lengths = self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows]
        longest = int(lengths.max()) if len(lengths) else 0
        positions = torch.arange(longest)
        inside = positions < lengths[:, None]
        places = (starts[:, None] + positions).where(inside, torch.zeros((), dtype=torch.int64))
        values = (
            self.values[places]
            if len(self.values)
            else torch.zeros(places.shape, dtype=self.values.dtype)
        )
        return Ragged(values * inside, lengths)


Columns = dict[str, Tensor | Lists]


def gather(columns: Columns, rows: Rows | Tensor) -> Batch:
    """The given rows of each column."""
    index = torch.as_tensor(rows)
    return {
        name: column.gather(index) if isinstance(column, Lists) else column[index]
        for name, column in columns.items()
    }


@dataclass(frozen=True)
class Reading:
    """How the losses read a target column."""

    as_classes: bool = False
    as_amounts: bool = True
    """Only amounts are scaled."""
    ignored: int | None = None


def fit(
    data: Data, inputs: list[str], train: pa.Table, readings: dict[str, Reading]
) -> list[Field]:
    """Fields of all inputs and targets, from the training rows only."""
    as_input = Reading(as_amounts=data.scale == "standard")
    fields = []
    for name in inputs:
        reading = replace(as_input, as_classes=name in data.categorical)
        fields.append(_fit(train, name, reading, is_target=False))
    for name in data.targets:
        reading = readings.get(name, Reading())
        scaled = reading.as_amounts and data.target_scale == "standard"
        stored = data.shift.get(name, name)
        field = _fit(train, stored, replace(reading, as_amounts=scaled), is_target=True)
        fields.append(replace(field, name=name))
    if data.sample_weight is not None:
        column = data.sample_weight.column
        fields.append(Field(column, "number", str(train[column].type), is_weight=True))
    return fields


def _fit(table: pa.Table, name: str, reading: Reading, is_target: bool) -> Field:
    column, where = table[name], f"{'data.target' if is_target else 'data.inputs'}: column {name!r}"
    kind, shape = kind_of(column.type, where)
    is_class = reading.as_classes
    if is_class and not is_target and kind not in ("number", "category"):
        raise DataError(f"{where} is {column.type}: only single values can be categorical")
    if is_class and kind == "number":
        kind = "category"
    if is_class and kind == "tensor":
        kind = "labels"
    ignored = reading.ignored if is_target and is_class else None
    field = Field(name, kind, str(column.type), is_target, shape=shape, ignored=ignored)
    if kind == "category":
        return _with_vocabulary(field, plain(column), where)
    if kind == "tokens" and not pa.types.is_integer(flat(column)[0].type):
        distinct = tuple(sorted(pc.unique(flat(column)[0]).to_pylist()))
        unknown = 0 if is_target else 1
        return replace(field, vocabulary=distinct, num_tokens=len(distinct) + unknown)
    if kind in ("tokens", "labels"):
        return replace(field, num_tokens=_num_classes(flat(column)[0], ignored, where))
    numbers = _numbers(column, where)
    if not len(numbers):
        return field
    center, deviation = float(numbers.mean()), float(numbers.std())
    if not np.isfinite(deviation):
        raise DataError(f"{where} holds numbers too large to scale, up to {abs(numbers).max():g}")
    if deviation <= 1e-12 * abs(numbers).max():
        deviation = 1.0  # a constant column becomes 0
    if reading.as_amounts:
        return replace(field, mean=center, deviation=deviation, center=center)
    return replace(field, center=center)


def _with_vocabulary(field: Field, values: Any, where: str) -> Field:
    """The field with its distinct values in sorted order, and for targets their counts."""
    if not (pa.types.is_integer(values.type) or _is_named(values.type)):
        raise DataError(
            f"{where} is {values.type}, but is read as classes: store it as whole numbers or text"
        )
    counted = sorted(
        (
            (item["values"], item["counts"])
            for item in pc.value_counts(values).to_pylist()
            if field.ignored is None or item["values"] != field.ignored
        ),
        key=lambda pair: pair[0],
    )
    if len(counted) > LARGEST_VOCABULARY:
        raise DataError(
            f"{where} has {len(counted)} distinct values, "
            f"more than {LARGEST_VOCABULARY}: not a category"
        )
    counts = tuple(count for _, count in counted) if field.is_target else None
    return replace(field, vocabulary=tuple(value for value, _ in counted), counts=counts)


def _is_named(kind: pa.DataType) -> bool:
    types = pa.types
    tests = (types.is_boolean, types.is_string, types.is_large_string, types.is_string_view)
    return any(test(kind) for test in tests)


def _num_classes(values: Any, ignored: int | None, where: str) -> int:
    """One more than the highest class number. Raises DataError for negative ones."""
    numbers = values.to_numpy(zero_copy_only=False)
    kept = numbers[numbers != ignored] if ignored is not None else numbers
    if len(kept) and (kept.min() < 0 or (kept != kept.astype(np.int64)).any()):
        raise DataError(f"{where} holds {kept.min()}: class numbers and tokens count from 0")
    return int(kept.max()) + 1 if len(kept) else 1


def _numbers(column: Any, where: str) -> np.ndarray[Any, Any]:
    values = flat(column)[0]
    if not (
        pa.types.is_floating(values.type)
        or pa.types.is_integer(values.type)
        or pa.types.is_decimal(values.type)
        or pa.types.is_boolean(values.type)
    ):
        raise DataError(f"{where} is {values.type}, expected numbers")
    numbers = np.asarray(values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False))
    if pa.types.is_integer(values.type) and len(numbers) and abs(numbers).max() > 2**53:
        raise DataError(
            f"{where} holds whole numbers beyond 2^53, which floats cannot tell apart; "
            "if they are names, list the column in data.categorical"
        )
    return numbers


def encode(
    fields: list[Field],
    table: pa.Table,
    shift: dict[str, str] | None = None,
    kind: type[np.floating[Any]] = np.float32,
) -> Columns:
    """Tensors of the table's rows, fractions as `kind`.

    Raises DataError naming column, value and first row.
    """
    return {field.name: _encode(field, table, shift or {}, kind) for field in fields}


def _encode(
    field: Field, table: pa.Table, shift: dict[str, str], kind: type[np.floating[Any]]
) -> Tensor | Lists:
    stored = shift.get(field.name, field.name)
    key = "target" if field.is_target else "sample_weight" if field.is_weight else "inputs"
    where = f"data.{key}: column {stored!r}"
    column = table[stored]
    if field.is_target or field.kind != "category":
        refuse_missing(column, where)
    if field.kind == "category":
        return torch.from_numpy(_codes(field, plain(column), where))
    values, offsets = flat(column)
    if field.kind == "tokens":
        if field.vocabulary is None:
            codes = _class_numbers(field, values, where)
        else:
            codes = _codes(field, values, where)
        lists = Lists(torch.from_numpy(codes.copy()), torch.from_numpy(offsets))
        return _next_items(lists) if field.name in shift else lists
    if field.kind == "labels":
        return torch.from_numpy(_class_numbers(field, values, where)).reshape(-1, *field.shape)
    numbers = (_numbers(column, where) - field.mean) / field.deviation
    tensor = torch.from_numpy(numbers.astype(kind))
    if field.kind == "series":
        return Lists(tensor, torch.from_numpy(offsets))
    if tensor.numel() != len(column) * int(np.prod(field.shape)):
        raise DataError(f"{where}: expected {field.shape} numbers in each row")
    return tensor.reshape(len(column), *field.shape)


def _class_numbers(field: Field, values: Any, where: str) -> np.ndarray[Any, Any]:
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


def _codes(field: Field, values: Any, where: str) -> np.ndarray[Any, Any]:
    """Place of each value in the vocabulary, counted from 1 for inputs (0: unknown)."""
    vocabulary = pa.array(field.vocabulary or ())
    try:
        found = pc.index_in(values.cast(vocabulary.type), vocabulary)
    except pa.ArrowException:
        found = pa.nulls(len(values), pa.int32())
    if field.is_target:
        if field.ignored is not None and pa.types.is_integer(values.type):
            left_out = pc.equal(values, field.ignored)
            found = pc.if_else(left_out, pa.scalar(IGNORED, pa.int32()), found)
        unseen = np.flatnonzero(pc.is_null(found).to_numpy(zero_copy_only=False))
        if len(unseen):
            value = values[int(unseen[0])].as_py()
            raise DataError(
                f"{where}: {value!r} in row {unseen[0]} is in no training row"
                f"{nearest(value, field.vocabulary or ()) if isinstance(value, str) else ''}"
            )
        return np.asarray(found.to_numpy(zero_copy_only=False).astype(np.int64))
    return np.asarray(pc.fill_null(pc.add(found, 1), UNKNOWN).to_numpy().astype(np.int64))


def _next_items(lists: Lists) -> Lists:
    """Each list without its first item: position t's target is item t + 1."""
    lengths = lists.offsets[1:] - lists.offsets[:-1]
    keep = torch.ones(len(lists.values), dtype=torch.bool)
    keep[lists.offsets[:-1][lengths > 0]] = False
    shorter = (lengths - 1).clamp(min=0)
    zero = torch.zeros(1, dtype=torch.int64)
    return Lists(lists.values[keep], torch.cat([zero, shorter.cumsum(0)]))
