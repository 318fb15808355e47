"""Column types, preprocessing fitted on the training rows, and the tensors that come of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from pipeline.data.arrow import flat, plain, refuse_missing
from pipeline.data.batch import Batch, Ragged
from pipeline.data.order import Rows
from pipeline.errors import DataError
from pipeline.registry import nearest
from pipeline.spec import Data

LARGEST_VOCABULARY = 100_000
UNKNOWN = 0
"""Code of an input category that no training row has; known ones count from 1."""


@dataclass(frozen=True)
class Field:
    """One column: how its raw values become tensors, fitted on the training rows."""

    name: str
    kind: Literal["number", "category", "tensor", "tokens", "series"]
    """float [N]; int64 [N] codes; float [N, *shape]; ragged int64; ragged float."""
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
    """Tokens or classes, counted from 0, of lists and tensors."""
    ignored: int | None = None
    """A class number that marks items to leave out; it is no class."""

    @property
    def num_codes(self) -> int:
        """How many codes a category or token can have, unknown included."""
        if self.kind in ("tokens", "tensor"):
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


def fit(
    data: Data, inputs: list[str], train: pa.Table, class_targets: dict[str, int | None]
) -> list[Field]:
    """Fields of all inputs and targets, from the training rows only.

    `class_targets` are the targets that a loss reads as class numbers, each with the number that
    marks items to leave out.
    """
    fields = [
        _fit(train, name, name in data.categorical, False, data.scale == "standard")
        for name in inputs
    ]
    for name in data.targets:
        stored = data.shift.get(name, name)
        is_class, ignored = name in class_targets, class_targets.get(name)
        field = _fit(train, stored, is_class, True, data.target_scale == "standard", ignored)
        fields.append(replace(field, name=name))
    return fields


def _fit(
    table: pa.Table,
    name: str,
    is_category: bool,
    is_target: bool,
    scale: bool,
    ignored: int | None = None,
) -> Field:
    column, role = table[name], "data.target" if is_target else "data.inputs"
    where = f"{role}: column {name!r}"
    kind, shape = _kind(column.type, where)
    if is_category and kind == "number":
        kind = "category"
    base: dict[str, Any] = {
        "arrow_type": str(column.type), "is_target": is_target, "ignored": ignored
    }  # fmt: skip
    if kind == "category":
        values = plain(column)
        if pa.types.is_floating(values.type) or pa.types.is_decimal(values.type):
            raise DataError(
                f"{where} is {values.type}, but is read as classes: "
                "store it as whole numbers or text"
            )
        counted = sorted(
            (
                (item["values"], item["counts"])
                for item in pc.value_counts(values).to_pylist()
                if item["values"] != ignored
            ),
            key=lambda pair: pair[0],
        )
        if len(counted) > LARGEST_VOCABULARY:
            raise DataError(
                f"{role}: column {name!r} has {len(counted)} distinct values, "
                f"more than {LARGEST_VOCABULARY}: not a category"
            )
        counts = tuple(count for _, count in counted) if is_target else None
        vocabulary = tuple(value for value, _ in counted)
        return Field(name, "category", **base, vocabulary=vocabulary, counts=counts)
    if kind == "tokens":
        values = flat(column)[0]
        if pa.types.is_integer(values.type):
            return Field(name, "tokens", **base, num_tokens=_num_classes(values, ignored, where))
        distinct = tuple(sorted(pc.unique(values).to_pylist()))
        return Field(
            name, "tokens", **base, vocabulary=distinct,
            num_tokens=len(distinct) + (0 if is_target else 1),
        )  # fmt: skip
    numbers = _numbers(column, where)
    if is_category and kind == "tensor":
        classes = _num_classes(flat(column)[0], ignored, where)
        return Field(name, "tensor", **base, shape=shape, num_tokens=classes)
    mean, deviation = 0.0, 1.0
    if scale and len(numbers):
        mean, deviation = float(numbers.mean()), float(numbers.std())
        if deviation < 1e-12 * max(1.0, abs(mean)):
            deviation = 1.0  # a constant column becomes 0
    return Field(name, kind, **base, mean=mean, deviation=deviation, shape=shape)


def _num_classes(values: Any, ignored: int | None, where: str) -> int:
    """One more than the highest class number. Raises DataError for negative ones."""
    numbers = values.to_numpy(zero_copy_only=False)
    kept = numbers[numbers != ignored] if ignored is not None else numbers
    if len(kept) and (kept.min() < 0 or (kept != kept.astype(np.int64)).any()):
        raise DataError(f"{where} holds {kept.min()}: class numbers and tokens count from 0")
    return int(kept.max()) + 1 if len(kept) else 1


def _kind(
    kind: pa.DataType, where: str
) -> tuple[Literal["number", "category", "tensor", "tokens", "series"], tuple[int, ...]]:
    types = pa.types
    if isinstance(kind, pa.FixedShapeTensorType):
        return "tensor", tuple(kind.shape)
    if isinstance(kind, pa.BaseExtensionType):
        return _kind(kind.storage_type, where)
    if types.is_fixed_size_list(kind):
        shape: tuple[int, ...] = ()
        while types.is_fixed_size_list(kind):
            shape, kind = (*shape, kind.list_size), kind.value_type
        if not (types.is_floating(kind) or types.is_integer(kind)):
            raise DataError(f"{where} holds fixed-size lists of {kind}: expected numbers")
        return "tensor", shape
    if types.is_list(kind) or types.is_large_list(kind):
        inner = kind.value_type
        if types.is_floating(inner):
            return "series", ()
        if types.is_integer(inner) or types.is_string(inner) or types.is_large_string(inner):
            return "tokens", ()
        raise DataError(f"{where} holds lists of {inner}: expected numbers or text")
    if types.is_floating(kind) or types.is_integer(kind) or types.is_decimal(kind):
        return "number", ()
    if types.is_boolean(kind) or types.is_dictionary(kind):
        return "category", ()
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return "category", ()
    if types.is_temporal(kind):
        raise DataError(
            f"{where} is {kind}: dates and times are no inputs as they are; "
            "make numbers of them first, such as days since a date, month, hour"
        )
    raise DataError(f"{where} is {kind}: expected numbers, text, booleans or lists of them")


def _numbers(column: Any, where: str) -> np.ndarray[Any, Any]:
    values = flat(column)[0]
    if not (
        pa.types.is_floating(values.type)
        or pa.types.is_integer(values.type)
        or pa.types.is_decimal(values.type)
        or pa.types.is_boolean(values.type)
    ):
        raise DataError(f"{where} is {values.type}, expected numbers")
    numbers = values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return np.asarray(numbers)


def encode(fields: list[Field], table: pa.Table, shift: dict[str, str] | None = None) -> Columns:
    """Tensors of the table's rows. Raises DataError naming column, value and first row."""
    return {field.name: _encode(field, table, shift or {}) for field in fields}


def _encode(field: Field, table: pa.Table, shift: dict[str, str]) -> Tensor | Lists:
    stored = shift.get(field.name, field.name)
    where = f"{'data.target' if field.is_target else 'data.inputs'}: column {stored!r}"
    column = table[stored]
    if field.is_target or field.kind != "category":
        refuse_missing(column, where)
    if field.kind == "category":
        return torch.from_numpy(_codes(field, plain(column), where))
    values, offsets = flat(column)
    if field.kind == "tokens":
        if field.vocabulary is None:
            codes = values.to_numpy(zero_copy_only=False).astype(np.int64)
            _refuse_unseen(field, codes, where)
        else:
            codes = _codes(field, values, where)
        lists = Lists(torch.from_numpy(codes.copy()), torch.from_numpy(offsets))
        return _next_items(lists) if field.name in shift else lists
    numbers = (_numbers(column, where) - field.mean) / field.deviation
    if field.num_tokens:
        _refuse_unseen(field, numbers, where)
    tensor = torch.from_numpy(numbers.astype(np.float32))
    if field.kind == "series":
        return Lists(tensor, torch.from_numpy(offsets))
    if tensor.numel() != len(column) * int(np.prod(field.shape)):
        raise DataError(f"{where}: expected {field.shape} numbers in each row")
    return tensor.reshape(len(column), *field.shape)


def _refuse_unseen(field: Field, codes: np.ndarray[Any, Any], where: str) -> None:
    """Class numbers and tokens must be among those of the training rows."""
    outside = (codes < 0) | (codes >= field.num_tokens)
    if field.ignored is not None:
        outside &= codes != field.ignored
    if outside.any():
        raise DataError(
            f"{where}: {codes[outside][0]:g} is outside 0..{field.num_tokens - 1}, "
            "the range of the training rows"
        )


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
            found = pc.if_else(left_out, pa.scalar(field.ignored, pa.int32()), found)
        unseen = np.flatnonzero(pc.is_null(found).to_numpy(zero_copy_only=False))
        if len(unseen):
            value = values[int(unseen[0])].as_py()
            raise DataError(
                f"{where}: {value!r} in row {unseen[0]} is in no training row"
                f"{nearest(value, field.vocabulary or ())}"
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
