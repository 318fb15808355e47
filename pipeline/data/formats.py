"""How files of each format are opened, and the schema under which several are read as one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs as pafs

from pipeline.data import csv, samples
from pipeline.data.locate import FileSet, plainly
from pipeline.errors import DataError
from pipeline.redact import redact

Schemas = dict[tuple[str, str], pa.Schema]
"""Each file's schema, by the name of its place and its path."""


def datasets(
    places: Mapping[str, list[FileSet]], categorical: Collection[str] = ()
) -> dict[str, ds.Dataset]:
    """One data set for each key of the spec; a column has one type in all files, if it can.

    Numbers in the CSV files of one key and text in those of another are both text only where the
    column is `categorical`: a stray word shall not turn amounts into names.

    Raises DataError naming the files of one key that have different columns, or types with nothing
    in common.
    """
    schemas = {key: _schemas(key, of_key) for key, of_key in places.items() if of_key}
    commons = {key: _common(key, by_file) for key, by_file in schemas.items()}
    types: dict[str, pa.DataType] = {}
    is_csv = all(place.format == "csv" for of_key in places.values() for place in of_key)
    for common in commons.values():
        for field in common:
            is_text = is_csv and field.name in categorical
            both = merged(types.get(field.name, field.type), field.type, is_text)
            types[field.name] = field.type if both is None else both
    datasets_by_key = {}
    for key, common in commons.items():
        fields = []
        for field in common:
            is_text = is_csv and field.name in categorical
            fields.append(
                field.with_type(merged(field.type, types[field.name], is_text) or field.type)
            )
        schema = pa.schema(fields, common.metadata)
        parts = [dataset_of(place, schema) for place in places[key]]
        datasets_by_key[key] = parts[0] if len(parts) == 1 else ds.dataset(parts)
    return datasets_by_key


def merged(one: pa.DataType, other: pa.DataType, as_text: bool) -> pa.DataType | None:
    """A type for the values of both, or None. What is `as_text` in its file can be text always."""
    types = pa.types
    if one.equals(other) or types.is_null(other):
        return one
    if types.is_null(one):
        return other
    if types.is_dictionary(one) or types.is_dictionary(other):
        plain = [kind.value_type if types.is_dictionary(kind) else kind for kind in (one, other)]
        return merged(plain[0], plain[1], as_text)
    if all(types.is_integer(kind) or types.is_floating(kind) for kind in (one, other)):
        if types.is_floating(one) or types.is_floating(other):
            return pa.float64()
        return pa.uint64() if pa.uint64() in (one, other) else pa.int64()
    if as_text or all(types.is_string(k) or types.is_large_string(k) for k in (one, other)):
        return pa.large_string() if pa.large_string() in (one, other) else pa.string()
    return None


def _schemas(key: str, places: Iterable[FileSet]) -> Schemas:
    schemas: Schemas = {}
    for place in places:
        if place.format == "sample":
            schemas[place.name, place.name] = samples.sample(place.name).schema
        for path in place.paths:
            try:
                schemas[place.name, path] = _schema(path, place)
            except (pa.ArrowException, OSError, ValueError) as error:
                raise DataError(
                    f"{key}: {redact(place.name)} is not a {place.format} that can be read: "
                    f"{plainly(error, place.name)}"
                ) from None
    return schemas


def _schema(path: str, place: FileSet) -> pa.Schema:
    if place.format == "csv":
        return csv.schema(path, place.filesystem)
    return ds.dataset(path, filesystem=place.filesystem, format=_reader(place)).schema


def _common(key: str, schemas: Schemas) -> pa.Schema:
    """The columns of all files, which must be the same, with types that hold all values."""
    (first_name, first_path), first = next(iter(schemas.items()))
    is_text = all(path.lower().removesuffix(".gz").endswith(".csv") for _, path in schemas)
    fields = list(first)
    for (name, path), schema in schemas.items():
        is_same = sorted(schema.names) == sorted(first.names)
        kinds = [
            merged(field.type, schema.field(field.name).type, is_text) if is_same else None
            for field in fields
            if schema.names.count(field.name) == 1
        ]
        if not is_same or None in kinds:
            both = (path, first_path) if name == first_name else (name, first_name)
            raise DataError(
                f"{key}: {' and '.join(map(redact, both))} have different columns or types:\n"
                + _difference(schema, first)
            )
        if len(kinds) == len(fields):
            fields = [f.with_type(kind) for f, kind in zip(fields, kinds, strict=True)]
    return pa.schema(fields, first.metadata)


def _difference(one: pa.Schema, other: pa.Schema) -> str:
    here = _columns(one)
    there = _columns(other)
    first = ", ".join(f"{name}: {kind}" for name, kind in here if (name, kind) not in there)
    second = ", ".join(f"{name}: {kind}" for name, kind in there if (name, kind) not in here)
    return (
        f"  only in the first:  {first or 'none'}\n  only in the second: {second or 'none'}\n"
        "  write them with one schema (in pandas: astype; in pyarrow: table.cast)"
    )


def _columns(schema: pa.Schema) -> list[tuple[str, str]]:
    """Names and types in no order: columns are read by their names."""
    return sorted((column.name, str(column.type)) for column in schema)


def dataset_of(place: FileSet, schema: pa.Schema) -> ds.Dataset:
    """The rows of these files, read under one schema."""
    if place.format == "sample":
        return ds.dataset(samples.sample(place.name))
    return ds.dataset(
        place.paths, schema=schema, filesystem=place.filesystem, format=_reader(place)
    )


def _reader(place: FileSet) -> Any:
    """Reads a format in bounded memory."""
    if place.format == "csv":
        return csv.reader()
    if place.format == "parquet":
        # what a disk gives bit by bit is asked of a network at once, for a whole row group
        is_local = isinstance(place.filesystem, pafs.LocalFileSystem)
        options = ds.ParquetFragmentScanOptions(
            use_buffered_stream=is_local, pre_buffer=not is_local, page_checksum_verification=True
        )
        return ds.ParquetFileFormat(default_fragment_scan_options=options)
    return place.format
