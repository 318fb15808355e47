"""Arrow columns as plain arrays, and the values that none may hold."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray


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
    array = plain(column)
    offsets = None
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
        bad_rows = np.zeros(len(rows), bool)
        bad_rows[np.searchsorted(offsets, np.flatnonzero(bad), side="right") - 1] = True
        return bad_rows
    nothing = missing(rows)
    num_rows = int((~nothing).sum())
    bad_rows = np.zeros(len(rows), bool)
    if not num_rows:
        return bad_rows
    if len(values) != num_rows * _width(rows.type):  # a list inside is missing, and has no items
        return np.array([row is not None and _has_gap(row) for row in rows.to_pylist()], bool)
    bad_rows[~nothing] = bad.reshape(num_rows, -1).any(1)  # missing rows have no values
    return bad_rows


def _width(kind: pa.DataType) -> int:
    is_list = pa.types.is_fixed_size_list(kind)
    return int(kind.list_size) * _width(kind.value_type) if is_list else 1


def _has_gap(value: Any) -> bool:
    if isinstance(value, list):
        return any(_has_gap(item) for item in value)
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def is_text(arrow_type: pa.DataType) -> bool:
    """Whether values of this type are text."""
    types = pa.types
    tests = (types.is_string, types.is_large_string, types.is_string_view)
    return any(test(arrow_type) for test in tests)
