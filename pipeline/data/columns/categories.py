"""Columns of classes: single categories, and tensors of class numbers."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from pipeline.data.arrow import flat, is_text, missing, plain
from pipeline.data.columns.base import (
    ColumnError,
    Encoded,
    Field,
    Profile,
    Statistics,
    filled,
    refuse_other_text,
)
from pipeline.registry import nearest
from pipeline.spec.data import Scale
from pipeline.spec.section import yaml_text

IGNORED = -100
"""Encoded class number of an item that the losses skip: no class can have it."""
UNKNOWN = 0
"""Code of an input category that no training row has; known ones count from 1."""
LARGEST_VOCABULARY = 100_000


@dataclass(frozen=True)
class Category(Field):
    """One class of a vocabulary: int64 [N], for inputs from 1 on (0: unknown)."""

    vocabulary: tuple[Any, ...] | None = None
    counts: tuple[int, ...] | None = None
    ignored: int | None = None
    """A raw class number that marks items to skip; encoded as IGNORED, it is not a class."""
    has_missing: bool = False
    """Whether missing is a category of its own, the last one."""
    positive: str | None = None
    """The value that means yes, as text: the last of the vocabulary."""

    kind: ClassVar[str] = "category"
    is_single: ClassVar[bool] = True
    is_cell: ClassVar[bool] = True

    @property
    def num_codes(self) -> int:
        """How many codes there are, unknown and missing included."""
        return len(self.vocabulary or ()) + (0 if self.is_target else 1) + self.has_missing

    @property
    def is_optional(self) -> bool:
        return self.has_missing or super().is_optional

    def fill_category(self) -> Field | None:
        return replace(self, has_missing=True) if self.is_input else None

    def fill_constant(self, value: float | str, arrow_type: pa.DataType) -> Field | None:
        is_coded = pa.types.is_dictionary(arrow_type)
        value_type = arrow_type.value_type if is_coded else arrow_type
        if pa.types.is_boolean(value_type):
            if value not in ("true", "false"):
                raise ColumnError(f"is {value!r}, expected 'true' or 'false', as the column holds")
            return replace(self, fill=value == "true")
        constant = int(value) if isinstance(value, float) and value.is_integer() else value
        try:
            held = pa.scalar(constant, value_type).as_py()
        except (pa.ArrowException, OverflowError, TypeError):
            held = None
        if held != constant:
            raise ColumnError(f"is {constant!r}, expected {value_type}, as the column holds")
        return replace(self, fill=constant)

    def statistics(self, scale: Scale = "none", unless_binary: bool = False) -> Statistics:
        return CategoryStatistics(self)

    def check_readable(self, column: Any) -> None:
        if self.is_target:
            super().check_readable(column)

    def encode(self, column: Any, dtype: np.dtype[Any]) -> Encoded:
        return codes_in_vocabulary(self, column, self.ignored, self.has_missing).astype(dtype)

    def numbers(self, column: torch.Tensor) -> torch.Tensor:
        if not self.vocabulary or not isinstance(self.vocabulary[0], int | float):
            return column
        return torch.tensor(self.vocabulary, dtype=torch.float64, device=column.device)[column]

    def from_cells(self, cells: Any) -> Any:
        if not pa.types.is_null(cells.type):
            refuse_other_text(self, cells)
        return super().from_cells(cells)

    @property
    def empty_type(self) -> pa.DataType:
        return pa.array(self.vocabulary).type if self.vocabulary else pa.float64()


@dataclass(frozen=True)
class Labels(Field):
    """Class numbers in one shape: int64 [N, *shape]."""

    num_classes: int = 0
    ignored: int | None = None
    """A raw class number that marks items to skip; encoded as IGNORED, it is not a class."""

    kind: ClassVar[str] = "labels"

    @property
    def num_codes(self) -> int:
        """How many class numbers there are."""
        return self.num_classes

    def statistics(self, scale: Scale = "none", unless_binary: bool = False) -> Statistics:
        return ClassNumberStatistics(self, self.ignored)

    def encode(self, column: Any, dtype: np.dtype[Any]) -> Encoded:
        numbers = class_numbers(flat(column)[0], self.num_classes, self.ignored)
        return numbers.reshape(-1, *self.shape).astype(dtype)


class CategoryStatistics(Statistics):
    """Distinct values, and how often each stands in the training rows."""

    field: Category

    def __init__(self, field: Category) -> None:
        super().__init__(field)
        self.distinct = Distinct()

    def observe(self, column: Any) -> None:
        values = filled(self.field, plain(column))
        if pa.types.is_floating(values.type) or pa.types.is_decimal(values.type):
            advice = "leave it out of data.categorical"
            if self.field.is_target:
                advice = "for amounts take a loss such as mse, l1 or huber"
            problem = f"is {values.type}, but is read as classes"
            raise ColumnError(problem, f"store classes as whole numbers or text; {advice}")
        self.distinct.add(values)

    def fit(self) -> Field:
        known = self.distinct.sorted_without(self.field.ignored)
        if self.field.positive is not None:
            known = _with_last(known, self.field.positive)
        counts = tuple(self.distinct.counts[value] for value in known)
        return replace(
            self.field, vocabulary=known, counts=counts if self.field.is_target else None
        )

    def profile(self) -> Profile:
        return self.distinct.profile()


def _with_last(known: tuple[Any, ...], text: str) -> tuple[Any, ...]:
    """The values, that of this text last. Raises ColumnError if there is none."""
    texts = [yaml_text(value) for value in known]
    if text not in texts:
        near = nearest(text, texts) or f" ({', '.join(texts[:4])})"
        raise ColumnError(f"has no value {text!r} in a training row{near}", "see data.positive")
    place = texts.index(text)
    return (*known[:place], *known[place + 1 :], known[place])


class Distinct:
    """Distinct values that come in parts, with their counts."""

    def __init__(self) -> None:
        self.counts: Counter[Any] = Counter()

    def add(self, values: Any) -> None:
        """Take in some values. Raises ColumnError for those that are not classes, or too many."""
        types = pa.types
        if not (types.is_integer(values.type) or is_name(values.type)):
            problem = f"is {values.type}, but is read as classes"
            raise ColumnError(problem, "store it as whole numbers or text")
        counted = pc.value_counts(values.drop_null())
        both = (counted.field("values").to_pylist(), counted.field("counts").to_pylist())
        self.counts.update(dict(zip(*both, strict=True)))
        if len(self.counts) > LARGEST_VOCABULARY:
            raise ColumnError(
                f"has more than {LARGEST_VOCABULARY} distinct values and cannot be a category"
            )

    def sorted_without(self, ignored: int | None) -> tuple[Any, ...]:
        """The values in order, but for the ignored one."""
        known = (value for value in self.counts if value != ignored or isinstance(value, bool))
        return tuple(sorted(known))

    def profile(self) -> Profile:
        """How many there are, and the most common ones."""
        first = {str(value): count for value, count in self.counts.most_common(20)}
        return {"count": self.counts.total(), "distinct": len(self.counts), "most_common": first}


class ClassNumberStatistics(Statistics):
    """Whole numbers that count from 0: tokens, and tensors of labels."""

    def __init__(self, field: Field, ignored: int | None) -> None:
        super().__init__(field)
        self.ignored = ignored
        self.highest = 0
        self.count = 0

    def observe(self, column: Any) -> None:
        numbers = flat(column)[0].to_numpy(zero_copy_only=False)
        if self.ignored is not None:
            numbers = numbers[numbers != self.ignored]
        if not len(numbers):
            return
        if numbers.min() < 0 or (numbers != numbers.astype(np.int64)).any():
            raise ColumnError(f"holds {numbers.min()}, but class numbers and tokens count from 0")
        self.highest = max(self.highest, int(numbers.max()))
        self.count = self.count + len(numbers)

    def fit(self) -> Field:
        return replace(self.field, num_classes=self.highest + 1)  # type: ignore[call-arg]

    def profile(self) -> Profile:
        return {"items": self.count, "highest": self.highest}


def class_numbers(values: Any, num_classes: int, ignored: int | None) -> NDArray[np.int64]:
    """Class numbers as they are, the ignored one as IGNORED.

    Raises ColumnError for one that no training row has.
    """
    codes = values.to_numpy(zero_copy_only=False).astype(np.int64)
    is_ignored = codes == ignored if ignored is not None else np.zeros(len(codes), bool)
    outside = ~is_ignored & ((codes < 0) | (codes >= num_classes))
    if outside.any():
        raise ColumnError(
            f"holds {codes[outside][0]}, outside 0..{num_classes - 1}, the range of the training "
            "rows"
        )
    return np.where(is_ignored, IGNORED, codes)


def codes_in_vocabulary(
    field: Field, values: Any, ignored: int | None = None, has_missing: bool = False
) -> NDArray[np.int64]:
    """Index of each value in the vocabulary, counted from 1 for inputs (0: unknown).

    Raises ColumnError for a target's value that no training row has.
    """
    values = filled(field, values)
    vocabulary = field.vocabulary or ()
    try:
        indices = pc.index_in(values, pa.array(vocabulary, values.type))
    except (pa.ArrowException, OverflowError):  # served values of another type than those trained
        index_of = {value: index for index, value in enumerate(vocabulary)}
        indices = pa.array([index_of.get(value) for value in values.to_pylist()], pa.int32())
    if field.is_target:
        if ignored is not None and pa.types.is_integer(values.type):
            with contextlib.suppress(pa.ArrowException, OverflowError):  # no value of this type
                is_ignored = pc.equal(values, pa.scalar(ignored, values.type))
                indices = pc.if_else(is_ignored, pa.scalar(IGNORED, pa.int32()), indices)
        unseen = np.asarray(pc.is_null(indices).to_numpy(zero_copy_only=False))
        if unseen.any():
            value = values[int(np.flatnonzero(unseen)[0])].as_py()
            like = nearest(value, vocabulary) if isinstance(value, str) else ""
            rows = unseen if field.is_single else None
            raise ColumnError(f"holds {value!r}, which is in no training row{like}", rows=rows)
        return np.asarray(indices.to_numpy(zero_copy_only=False).astype(np.int64))
    codes = np.asarray(pc.fill_null(pc.add(indices, 1), UNKNOWN).to_numpy().astype(np.int64))
    if has_missing:
        codes[missing(values)] = field.num_codes - 1
    return codes


def is_name(arrow_type: pa.DataType) -> bool:
    """Whether values of this type can only be names of classes."""
    return bool(pa.types.is_boolean(arrow_type)) or is_text(arrow_type)
