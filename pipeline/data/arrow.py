"""Arrow columns: what they become, as plain arrays, and the values that none may hold."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.errors import DataError

Kind = Literal[
    "number",  # float [N]
    "category",  # int64 [N] codes of a vocabulary
    "tensor",  # float [N, *shape]
    "labels",  # int64 [N, *shape] class numbers
    "tokens",  # ragged int64
    "series",  # ragged float
    "date",  # float [N, K]: one number for the days gone by, two for each place in a cycle
    "image",  # float [N, H, W] or [N, 3, H, W]
]


def kind_of(kind: pa.DataType, where: str) -> tuple[Kind, tuple[int, ...]]:
    """What a column of this type becomes, and the shape of a tensor's rows.

    Raises DataError for types that nothing is made of.
    """
    types = pa.types
    if isinstance(kind, pa.FixedShapeTensorType):
        return "tensor", tuple(kind.shape)
    if isinstance(kind, pa.BaseExtensionType):
        return kind_of(kind.storage_type, where)
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
    if types.is_dictionary(kind):
        kind_of(kind.value_type, where)
        return "category", ()
    if types.is_boolean(kind):
        return "category", ()
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return "category", ()
    if types.is_null(kind):
        raise DataError(f"{where} holds no value in any row")
    if types.is_temporal(kind):
        raise DataError(
            f"{where} is {kind}: dates and times are read when data.dates names their column, "
            "as days gone by and places in the year, the week and the day"
        )
    if types.is_binary(kind) or types.is_large_binary(kind):
        raise DataError(f"{where} is {kind}: encoded images are read when data.images names it")
    raise DataError(f"{where} is {kind}: expected numbers, text, booleans or lists of them")


def plain(column: Any) -> Any:
    """The column as one array, without extension type or dictionary encoding."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # combine_chunks of no chunks, or of several
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_string_view(array.type):  # for which Arrow lacks most functions
        return array.cast(pa.large_string())
    return array


def flat(column: Any) -> tuple[Any, Any]:
    """Innermost values and, for lists of different lengths, the int64 offsets of the rows."""
    array, offsets = plain(column), None
    while pa.types.is_nested(array.type):
        if offsets is None and not pa.types.is_fixed_size_list(array.type):
            lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
            offsets = np.concatenate([[0], np.cumsum(lengths.astype(np.int64))])
        array = plain(array.flatten())
    return array, offsets


def missing(column: Any) -> NDArray[np.bool_]:
    """True for each row without a value; NaN is none either: bool [N]."""
    rows = plain(column)
    if rows.null_count:
        return np.asarray(pc.is_null(rows, nan_is_null=True).to_numpy(zero_copy_only=False))
    if pa.types.is_floating(rows.type):
        return np.asarray(np.isnan(rows.to_numpy()))
    return np.zeros(len(rows), bool)


def unreadable(column: Any) -> NDArray[np.bool_]:
    """True for each row that holds infinity, or a missing value or NaN inside its list: bool [N].

    Rows without any value are not among them.
    """
    rows = plain(column)
    types = pa.types
    if types.is_struct(rows.type) or types.is_map(rows.type):
        return np.zeros(len(rows), bool)  # refused by its type
    if types.is_floating(rows.type):
        return np.asarray(np.isinf(rows.to_numpy(zero_copy_only=False)))
    if not types.is_nested(rows.type):
        return np.zeros(len(rows), bool)
    values, offsets = flat(rows)
    if types.is_floating(values.type):
        bad = ~np.isfinite(values.to_numpy(zero_copy_only=False))
    else:
        bad = pc.is_null(values).to_numpy(zero_copy_only=False)
    if offsets is not None:
        found = np.zeros(len(rows), bool)
        found[np.searchsorted(offsets, np.flatnonzero(bad), side="right") - 1] = True
        return found
    nothing = missing(rows)
    num_rows, found = int((~nothing).sum()), np.zeros(len(rows), bool)
    if not num_rows:
        return found
    if len(values) != num_rows * _width(rows.type):  # a list inside is missing, and left out
        return np.array([row is not None and _has_gap(row) for row in rows.to_pylist()], bool)
    found[~nothing] = bad.reshape(num_rows, -1).any(1)  # missing rows have no values
    return found


def _width(kind: pa.DataType) -> int:
    is_list = pa.types.is_fixed_size_list(kind)
    return int(kind.list_size) * _width(kind.value_type) if is_list else 1


def _has_gap(value: Any) -> bool:
    if isinstance(value, list):
        return any(_has_gap(item) for item in value)
    return value is None or (isinstance(value, float) and not math.isfinite(value))
