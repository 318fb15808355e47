"""What all kinds of columns share: fields fitted on the training rows, and errors."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.arrow import is_text, missing, unreadable
from pipeline.data.batch import Column
from pipeline.errors import DataError
from pipeline.spec.data import Scale

FIRST_ROWS = 5
"""How many rows an error names."""
MEAN = "mean"
"""Stands for a fill value that is known once all training rows are."""

FloatType = type[np.floating[Any]]
"""What numbers are stored as: float32, or float64 if the spec asks for it."""
Role = Literal["input", "target", "weight", "exposure"]
RowName = Callable[[int], str]
"""What a row of a table is called in messages."""
Profile = dict[str, Any]
"""Plain numbers about one column, for people."""
Amount = float | tuple[float, ...]
"""One number for a column, or one for each position of its vectors."""


class ColumnError(Exception):
    """Values that a column cannot hold. `problem` continues a sentence about the column."""

    def __init__(self, problem: str, fix: str = "", rows: NDArray[np.bool_] | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.fix = fix
        self.rows = rows

    def told(self, where: str, row_name: RowName) -> DataError:
        """The error for the user, with the column and the first rows."""
        text = f"{where} {self.problem}"
        if self.rows is not None:
            first = np.flatnonzero(self.rows)[:FIRST_ROWS]
            text += f", first at row {', '.join(row_name(int(row)) for row in first)}"
            text += " (counted from 0)"
        return DataError(f"{text}; {self.fix}" if self.fix else text)


@contextlib.contextmanager
def column_errors(where: str, row_name: RowName = str) -> Iterator[None]:
    """Raise a ColumnError as a DataError that names the column and its rows."""
    try:
        yield
    except ColumnError as error:
        raise error.told(where, row_name) from None


def refuse_rows(bad: NDArray[np.bool_], what: str, fix: str) -> None:
    """Raise ColumnError with the number of bad rows, which have `what`, if there are any."""
    if bad.any():
        raise ColumnError(f"has {what} in {in_rows(bad.sum())}", fix, bad)


def in_rows(count: int) -> str:
    """So many rows, in words."""
    return "1 row" if count == 1 else f"{count:,} rows"


@dataclass(frozen=True)
class Reading:
    """How the losses read a target column."""

    as_classes: bool = False
    as_amounts: bool = True
    """Only amounts are scaled."""
    as_float64: bool = False
    """Whether numbers are kept in float64."""
    ignored: int | None = None
    is_declared: bool = True
    """Whether the losses say what they read; else a column of 0 and 1 only is not an amount."""


@dataclass(frozen=True)
class Lists:
    """The encoded lists of some rows: `values` [total], `lengths` int64 [N]."""

    values: NDArray[Any]
    lengths: NDArray[np.int64]

    def without_first(self) -> Lists:
        """Each list without its first item."""
        starts = np.cumsum(self.lengths) - self.lengths
        keep = np.ones(len(self.values), bool)
        keep[starts[self.lengths > 0]] = False
        return Lists(self.values[keep], np.maximum(self.lengths - 1, 0))


Encoded = NDArray[Any] | Lists
"""A column's rows: [N, *shape], or lists of different lengths."""


@dataclass(frozen=True)
class Field(ABC):
    """One column: how its raw values become tensors. Each kind of column is a subclass."""

    name: str
    arrow_type: str
    role: Role = "input"
    shape: tuple[int, ...] = ()
    """The encoded row's shape."""
    fill: Any = None
    """The raw value that missing values are replaced by."""

    kind: ClassVar[str]
    """Its name in the registry and in messages."""
    is_single: ClassVar[bool] = False
    """Whether the encoded row is one value."""
    is_list: ClassVar[bool] = False
    """Whether encoded rows differ in size."""
    is_amount: ClassVar[bool] = False
    """Whether rows hold amounts, which may be scaled."""
    is_cell: ClassVar[bool] = False
    """Whether the raw row is one value of a plain type, as in a table on paper."""

    # what kinds without them answer; each is a plain attribute of those that have it

    @property
    def mean(self) -> Amount:
        """What is subtracted from each number, after the logarithm if there is one."""
        return 0.0

    @property
    def deviation(self) -> Amount:
        """What the difference is divided by."""
        return 1.0

    @property
    def log(self) -> bool:
        """Whether log(1 + x) is taken before anything else."""
        return False

    @property
    def center(self) -> Amount:
        """Mean of the training rows in the column's own unit, whether it is scaled or not."""
        return 0.0

    @property
    def vocabulary(self) -> tuple[Any, ...] | None:
        """Distinct training values in sorted order."""
        return None

    @property
    def counts(self) -> tuple[int, ...] | None:
        """The training rows of each vocabulary entry, or of 0 and 1, where it is a target."""
        return None

    @property
    def num_codes(self) -> int:
        """Number of codes that encoded rows can hold; 0 for numbers."""
        return 0

    @property
    def is_input(self) -> bool:
        """Whether the model reads it."""
        return self.role == "input"

    @property
    def is_read(self) -> bool:
        """Whether a prediction needs it."""
        return self.role in ("input", "exposure")

    @property
    def is_target(self) -> bool:
        """Whether the losses read it."""
        return self.role == "target"

    @property
    def where(self) -> str:
        """The key of the spec that names columns of this role."""
        keys = {
            "input": "data.inputs",
            "target": "data.target",
            "weight": "data.sample_weight",
            "exposure": "data.exposure",
        }
        return keys[self.role]

    @property
    def is_optional(self) -> bool:
        """Whether rows without a value can be read."""
        return self.fill is not None

    def dtype(self, float_dtype: FloatType) -> np.dtype[Any]:
        """The type that encoded rows are stored in: for codes the smallest that holds them."""
        if not self.num_codes:
            return np.dtype(float_dtype)
        sizes = (np.int8, np.int16, np.int32, np.int64)
        return np.dtype(next(size for size in sizes if self.num_codes <= np.iinfo(size).max))

    def fill_mean(self) -> Field | None:
        """The field with its mean in the place of missing values; None if it has no mean."""
        return None

    def fill_category(self) -> Field | None:
        """The field with missing values as a category; None if it has no categories."""
        return None

    def fill_constant(self, value: float | str, arrow_type: pa.DataType) -> Field | None:
        """The field with `value` in the place of missing values; None if it takes none.

        Raises ColumnError, which continues the value's key, for one that the column cannot hold.
        """
        return None

    def statistics(self, scale: Scale = "none", unless_binary: bool = False) -> Statistics:
        """What is learned from the training rows, before the first of them.

        `scale` is for amounts; with `unless_binary` a column of 0 and 1 only is left as it is.
        """
        return NoStatistics(self)

    def check_readable(self, column: Any) -> None:
        """Raise ColumnError for missing values that nothing replaces, and for NaN and infinity."""
        if self.fill is None:
            refuse_rows(missing(column), "missing values", "fill them in first")
        what = "NaN, infinity or a missing item"
        refuse_rows(unreadable(column), what, "correct or drop them first")

    @abstractmethod
    def encode(self, column: Any, dtype: np.dtype[Any]) -> Encoded:
        """A plain Arrow array of raw values as `dtype`. Raises ColumnError for what it cannot."""

    def gather(
        self, values: NDArray[Any], starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> Column:
        """A batch of the lists that stand at `starts`.

        Raises ColumnError for a row that cannot be decoded.
        """
        raise NotImplementedError(f"columns of {self.kind} are not lists")

    def numbers(self, column: Tensor) -> Tensor:
        """An encoded column as the numbers it stands for, if its values are numbers."""
        return column

    def from_cells(self, cells: Any) -> Any:
        """An Arrow array of a data frame's cells with the type that the training rows had.

        Raises ColumnError for text where numbers were, and the other way round.
        """
        if pa.types.is_null(cells.type):
            return cells.cast(self.empty_type)
        return cells

    @property
    def empty_type(self) -> pa.DataType:
        """The Arrow type of a column without any value."""
        return pa.list_(pa.float64()) if self.is_list or self.shape else pa.float64()

    def to_json(self) -> dict[str, Any]:
        """Plain values, to travel with the model."""
        return {"class": type(self).__name__, **asdict(self)}


class Statistics(ABC):
    """What the training rows say about a column, block by block."""

    def __init__(self, field: Field) -> None:
        self.field = field
        """The column before any row was seen."""

    @abstractmethod
    def observe(self, column: Any) -> None:
        """Take in the raw values of some rows. Raises ColumnError for values that cannot be."""

    @abstractmethod
    def fit(self) -> Field:
        """The column, once all training rows are seen."""

    @abstractmethod
    def profile(self) -> Profile:
        """Numbers about the training rows."""


class NoStatistics(Statistics):
    """Nothing: the spec alone describes the column."""

    def observe(self, column: Any) -> None:
        pass

    def fit(self) -> Field:
        return self.field

    def profile(self) -> Profile:
        return {}


def filled(field: Field, values: Any) -> Any:
    """Raw values, missing ones replaced by the field's `fill` if it has one."""
    if field.fill is None or not values.null_count:
        return values
    if pa.types.is_null(values.type):
        return pa.array([field.fill] * len(values))
    return pa.compute.fill_null(values, pa.scalar(field.fill, values.type))


def refuse_other_text(field: Field, cells: Any) -> None:
    """Raise ColumnError for cells of text where the vocabulary has numbers, or the reverse."""
    first = (field.vocabulary or (None,))[0]
    if first is not None and isinstance(first, str) != is_text(cells.type):
        raise ColumnError(
            f"is {cells.type}; the training rows had {field.arrow_type}, such as {first!r}"
        )
