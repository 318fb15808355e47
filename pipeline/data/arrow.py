"""Arrow columns: what they become, as plain arrays, and the values that none may hold."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import DataError

Kind = Literal[
    "number",  # float [N]
    "category",  # int64 [N] codes of a vocabulary
    "tensor",  # float [N, *shape]
    "labels",  # int64 [N, *shape] class numbers
    "tokens",  # ragged int64
    "series",  # ragged float
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
    if types.is_temporal(kind):
        raise DataError(
            f"{where} is {kind}: dates and times are no inputs as they are; "
            "make numbers of them first, such as days since a date, month, hour"
        )
    raise DataError(f"{where} is {kind}: expected numbers, text, booleans or lists of them")


def plain(column: Any) -> Any:
    """The column as one array, without extension type or dictionary encoding."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # combine_chunks of no chunks, or of several
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def flat(column: Any) -> tuple[Any, Any]:
    """Innermost values and, for lists of different lengths, the int64 offsets of the rows."""
    array, offsets = plain(column), None
    while pa.types.is_nested(array.type):
        if offsets is None and not pa.types.is_fixed_size_list(array.type):
            lengths = pc.list_value_length(array).to_numpy(zero_copy_only=False)
            offsets = np.concatenate([[0], np.cumsum(lengths.astype(np.int64))])
        array = plain(array.flatten())
    return array, offsets


def refuse_missing(column: Any, where: str) -> None:
    """Raise DataError with the first rows that hold a missing value, NaN or infinity."""
    rows = plain(column)
    if pa.types.is_struct(rows.type) or pa.types.is_map(rows.type):
        return  # refused by its type
    missing = pc.is_null(rows).to_numpy(zero_copy_only=False)
    what = "missing values"
    if not missing.any():
        values, offsets = flat(column)
        what = "rows with a missing value inside their list"
        bad = pc.is_null(values).to_numpy(zero_copy_only=False)
        if pa.types.is_floating(values.type) and not bad.any():
            what = "rows with NaN or infinity"
            bad = ~np.isfinite(values.to_numpy(zero_copy_only=False))
        if offsets is None:
            missing = bad.reshape(len(rows), -1).any(1) if len(rows) else bad
        else:
            missing[np.searchsorted(offsets, np.flatnonzero(bad), side="right") - 1] = True
    if missing.any():
        first = ", ".join(str(row) for row in np.flatnonzero(missing)[:5])
        raise DataError(
            f"{where}: {int(missing.sum())} {what}, first at row {first} (counted from 0); "
            "fill or drop them before training"
        )


def refuse_weights(column: Any, where: str) -> None:
    """Raise DataError for weights that cannot be: text, below 0, or nothing but 0."""
    values = plain(column)
    if kind_of(column.type, where)[0] != "number":
        raise DataError(f"{where} is {column.type}, expected numbers")
    numbers = values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    negative = np.flatnonzero(numbers < 0)
    if len(negative):
        first = negative[0]
        raise DataError(
            f"{where}: {numbers[first]:g} in row {first} (counted from 0), weights are at least 0"
        )
    if len(numbers) and not numbers.any():
        raise DataError(f"{where}: every weight is 0")
