"""Kinds of columns, one a file: what their training rows say, and the tensors they become.

A new kind is a subclass of `Field` in a file here and a line in `KINDS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.data.arrow import plain
from pipeline.data.columns.base import (
    Encoded,
    Field,
    FloatType,
    Lists,
    Profile,
    Reading,
    Role,
    RowName,
    Statistics,
    column_errors,
)
from pipeline.data.columns.categories import IGNORED, UNKNOWN, Category, Labels
from pipeline.data.columns.dates import Date
from pipeline.data.columns.images import Image
from pipeline.data.columns.numbers import FixedTensor, Number, Series
from pipeline.data.columns.tokens import Text, Tokens

__all__ = [
    "IGNORED",
    "UNKNOWN",
    "Category",
    "Date",
    "Encoded",
    "Field",
    "FixedTensor",
    "FloatType",
    "Image",
    "Labels",
    "Lists",
    "Number",
    "Profile",
    "Reading",
    "Role",
    "RowName",
    "Series",
    "Statistics",
    "Text",
    "Tokens",
    "column_errors",
    "encode",
    "from_json",
]

KINDS: dict[str, type[Field]] = {
    kind.__name__: kind
    for kind in (Number, FixedTensor, Series, Category, Labels, Tokens, Text, Date, Image)
}


def from_json(value: Mapping[str, Any]) -> Field:
    """The inverse of `Field.to_json`."""
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
    return KINDS[values.pop("class")](**values)


def encode(
    fields: Iterable[Field],
    table: pa.Table,
    shift: Mapping[str, str] | None = None,
    float_dtype: FloatType = np.float32,
    row_name: RowName = str,
) -> dict[str, Encoded]:
    """The table's rows as the steps read them, by the names of the fields.

    Raises DataError naming column, value and first row.
    """
    shift = shift or {}
    encoded = {}
    for field in fields:
        stored = shift.get(field.name, field.name)
        column = plain(table[stored])
        with column_errors(f"{field.where}: column {stored!r}", row_name):
            field.check_readable(column)
            rows = field.encode(column, field.dtype(float_dtype))
            if field.name in shift:
                assert isinstance(rows, Lists), "only lists are shifted"
                rows = rows.without_first()
            encoded[field.name] = rows
    return encoded
