"""Hashes of rows, whatever files they stand in, and of files."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.arrow import flat, missing, plain

READ_BYTES = 2**24
Hashes = NDArray[np.uint64]
GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def digest_rows(table: pa.Table, digest: Any) -> None:
    """Take names, types and values of the rows into the hash, however they are chunked."""
    for name, column in zip(table.column_names, table.columns, strict=True):
        array = plain(column)
        values, offsets = flat(array)
        digest.update(json.dumps([name, _type_name(array.type), len(array), len(values)]).encode())
        digest.update(np.packbits(missing(array)).tobytes())
        digest.update(np.packbits(missing(values)).tobytes())
        if offsets is not None:
            digest.update(np.diff(offsets).tobytes())
        for part in _bytes_of(values.drop_null()):
            digest.update(part)


def _type_name(kind: pa.DataType) -> str:
    """The type without what only files differ in: names of list items, sizes of offsets, units."""
    types = pa.types
    if types.is_fixed_size_list(kind):
        return f"{kind.list_size} x {_type_name(kind.value_type)}"
    if types.is_list(kind) or types.is_large_list(kind):
        return f"list of {_type_name(kind.value_type)}"
    for name, tests in {
        "text": (types.is_string, types.is_large_string),
        "bytes": (types.is_binary, types.is_large_binary),
        "time": (types.is_timestamp,),
        "date": (types.is_date,),
    }.items():
        if any(test(kind) for test in tests):
            return name
    return str(kind)


def _bytes_of(values: Any) -> Iterator[Any]:
    """The bytes of values that are all there."""
    types = pa.types
    if types.is_null(values.type):
        return
    if types.is_boolean(values.type):
        values = values.cast(pa.uint8())
    if types.is_timestamp(values.type):
        values = values.cast(pa.timestamp("us"), safe=False)
    if types.is_date(values.type):
        values = values.cast(pa.date32())
    is_text = types.is_string(values.type) or types.is_large_string(values.type)
    if is_text or types.is_binary(values.type) or types.is_large_binary(values.type):
        whole = values.cast(pa.large_binary())
        ends = np.frombuffer(whole.buffers()[1], np.int64)[whole.offset :][: len(whole) + 1]
        yield np.diff(ends).tobytes()
        if whole.buffers()[2] is not None:
            yield memoryview(whole.buffers()[2])[ends[0] : ends[-1]]
        return
    if values.null_count:
        values = values.fill_null(
            pa.scalar(0).cast(values.type)
            if not types.is_temporal(values.type)
            else pa.scalar(0, pa.int64()).cast(values.type, safe=False)
        )
    width = values.type.bit_width // 8
    yield memoryview(values.buffers()[1])[
        values.offset * width : (values.offset + len(values)) * width
    ]


def crc32(path: Path) -> int:
    """CRC-32 of the file, read in parts."""
    checksum = 0
    with path.open("rb") as file:
        while part := file.read(READ_BYTES):
            checksum = zlib.crc32(part, checksum)
    return checksum


def hash_rows(table: pa.Table, columns: list[str]) -> Hashes:
    """One hash for each row, of the values in `columns`."""
    hashes = np.zeros(len(table), np.uint64)
    for column in columns:
        hashes = mix(hashes * GOLDEN_GAMMA + _hash_column(table[column]))
    return hashes


def _hash_column(column: Any) -> Hashes:
    """One hash for each row of a column; a list's is the sum of its items', each by its place."""
    array = plain(column)
    if not pa.types.is_nested(array.type):
        return _hash_values(array)
    values, offsets = flat(array)
    if offsets is None:  # lists of one size; those that are missing have no values
        lengths = (~missing(array)).astype(np.int64)
        lengths *= len(values) // max(1, int(lengths.sum()))
        offsets = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.arange(len(values)) - np.repeat(offsets[:-1], np.diff(offsets))
    items = mix(_hash_values(values) + positions.astype(np.uint64) * GOLDEN_GAMMA)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(items, dtype=np.uint64)])
    hashes: Hashes = sums[offsets[1:]] - sums[offsets[:-1]] + np.diff(offsets).astype(np.uint64)
    return hashes


def _hash_values(array: Any) -> Hashes:
    """Hashes that are the same for a number in any type."""
    from pandas.util import hash_array

    types = pa.types
    if types.is_temporal(array.type):
        array = array.view(pa.int64() if array.type.bit_width == 64 else pa.int32())
    if types.is_boolean(array.type):
        array = array.cast(pa.int8())
    if (
        types.is_integer(array.type)
        or types.is_floating(array.type)
        or types.is_decimal(array.type)
    ):
        numbers = array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        return np.asarray(hash_array(numbers + 0.0), np.uint64)  # -0.0 is 0.0
    return np.asarray(hash_array(array.to_numpy(zero_copy_only=False)), np.uint64)


def mix(values: Hashes) -> Hashes:
    """Every bit of each value spread over all its bits (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
