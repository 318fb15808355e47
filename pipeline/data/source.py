"""From what `data` names (files, folders, globs, URIs, samples) to Arrow tables of rows."""

from __future__ import annotations

import glob
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.dataset as ds
import pyarrow.fs as pafs

from pipeline.data.arrow import kind_of, refuse_missing, refuse_weights
from pipeline.errors import DataError
from pipeline.registry import nearest
from pipeline.spec import Data

FORMATS = {
    ".parquet": "parquet", ".pq": "parquet",
    ".arrow": "ipc", ".ipc": "ipc", ".feather": "feather",
    ".csv": "csv",
}  # fmt: skip
# an empty cell of a text column is a missing value, as it is in every other column
READERS = {"csv": ds.CsvFileFormat(convert_options=pacsv.ConvertOptions(strings_can_be_null=True))}


@dataclass(frozen=True)
class Source:
    """Training and validation rows with the columns that the spec uses, and their fingerprint."""

    train: pa.Table
    validation: pa.Table | None
    inputs: list[str]
    fingerprint: str
    """SHA-256 over names, types and values of the used columns, whatever the file layout."""


def read(data: Data, base: Path) -> Source:
    """The rows that `data` names; relative paths start at `base`.

    Raises DataError naming the key, the file and the column.
    """
    train, inputs = _table(data, "data.train", data.train, base, None)
    if isinstance(data.validation, float):
        train, validation = _split(train, data.validation, data.split_seed)
    elif data.validation is not None:
        validation, _ = _table(data, "data.validation", data.validation, base, train.schema)
    else:
        validation = None
    return Source(train, validation, inputs, fingerprint(train, validation))


def fingerprint(*tables: pa.Table | None) -> str:
    """SHA-256 over the tables' schemas and values."""
    digest = hashlib.sha256()
    for table in tables:
        if table is None:
            continue
        sink = pa.BufferOutputStream()
        plain = table.replace_schema_metadata(None).combine_chunks()
        with pa.ipc.new_stream(sink, plain.schema) as writer:
            writer.write_table(plain)
        digest.update(sink.getvalue())
    return digest.hexdigest()


def _table(
    data: Data, key: str, names: str | list[str], base: Path, like: pa.Schema | None
) -> tuple[pa.Table, list[str]]:
    dataset = _open(key, [names] if isinstance(names, str) else names, base)
    shown = ", ".join(without_secrets(n) for n in ([names] if isinstance(names, str) else names))
    columns = dataset.schema.names
    made = set(data.shift)
    stored_targets = [column for column in data.targets if column not in made]
    weight = [data.sample_weight.column] if data.sample_weight else []
    others = {*stored_targets, *weight}
    inputs = data.inputs or [c for c in columns if c not in others and not _is_index(c)]
    wanted: dict[str, str] = {}
    for column in inputs:
        wanted.setdefault(column, "data.inputs")
    for column in stored_targets:
        wanted.setdefault(column, "data.target")
    for column in weight:
        wanted.setdefault(column, "data.sample_weight")
    if not inputs:
        raise DataError(f"data.inputs: {shown} has no column besides the target")
    for new, column in data.shift.items():
        if new not in data.targets:
            raise DataError(f"data.shift.{new}: is not named in data.target")
        if new in columns:
            raise DataError(f"data.shift.{new}: is a column of {shown}; give the target a new name")
        wanted.setdefault(column, f"data.shift.{new}")
    for column, at in wanted.items():
        if column not in columns:
            raise DataError(
                f"{at}: no column {column!r} in {shown}{nearest(column, columns)}; "
                f"columns: {', '.join(columns[:50])}{_delimiter(columns)}"
            )
        if columns.count(column) > 1:
            raise DataError(f"{at}: column {column!r} stands twice in {shown}")
    for column in data.categorical:
        if column not in inputs:
            raise DataError(
                f"data.categorical: {column!r} is not an input column{nearest(column, inputs)}"
            )
    try:
        table = dataset.to_table(columns=list(wanted))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{key}: {shown} cannot be read: {_plainly(error, names)}") from None
    if table.num_rows == 0:
        raise DataError(f"{key}: no rows in {shown}")
    _refuse_unreadable(table, wanted, "" if like is None else f" of {key}")
    if like is not None:
        for column in table.schema:
            if column.type != like.field(column.name).type:
                raise DataError(
                    f"{key}: column {column.name!r} is {column.type}, "
                    f"in data.train it is {like.field(column.name).type}"
                )
    return table, inputs


def _delimiter(columns: list[str]) -> str:
    odd = next((c for c in ";\t|" if len(columns) == 1 and c in columns[0]), None)
    return (
        f"\n  one column only: CSV files are read with commas, this one has {odd!r}" if odd else ""
    )


def _refuse_unreadable(table: pa.Table, wanted: dict[str, str], of: str) -> None:
    """Raise DataError with every column whose type or values nothing can be made of."""
    faults = []
    for column, at in wanted.items():
        where = f"{at}: column {column!r}{of}"
        try:
            kind_of(table[column].type, where)
            refuse_missing(table[column], where)
            if at == "data.sample_weight":
                refuse_weights(table[column], where)
        except DataError as fault:
            faults.append(str(fault))
    if faults:
        raise DataError("\n  ".join(faults))


def _is_index(column: str) -> bool:
    return column.startswith("__index_level_")  # what pandas leaves in Parquet


def _open(key: str, names: list[str], base: Path) -> ds.Dataset:
    if any(name.startswith("sample:") for name in names):
        if len(names) > 1:
            raise DataError(f"{key}: a sample stands alone, found {names}")
        return ds.dataset(sample(key, names[0].removeprefix("sample:")))
    parts = [_open_one(key, name, base) for name in names]
    for name, part in zip(names, parts, strict=True):
        if part.schema.remove_metadata() != parts[0].schema.remove_metadata():
            raise DataError(
                f"{key}: {name} and {names[0]} have different columns or types:\n"
                + _difference(part.schema, parts[0].schema)
            )
    return parts[0] if len(parts) == 1 else ds.dataset(parts)


def _difference(one: pa.Schema, other: pa.Schema) -> str:
    def described(schema: pa.Schema) -> set[str]:
        return {f"{column.name}: {column.type}" for column in schema}

    return (
        f"  only in the first: {sorted(described(one) - described(other))}\n"
        f"  only in the second: {sorted(described(other) - described(one))}"
    )


def _open_one(key: str, name: str, base: Path) -> ds.Dataset:
    shown = without_secrets(name)
    if not name.strip():
        raise DataError(f"{key}: an empty path")
    try:
        if "://" in name:
            filesystem, path = pafs.FileSystem.from_uri(name)
            paths = _files(filesystem, path)
        else:
            filesystem = pafs.LocalFileSystem()
            pattern = str(Path(glob.escape(str(base))) / Path(name).expanduser())
            is_glob = glob.has_magic(name)
            found = sorted(glob.glob(pattern, recursive=True)) if is_glob else [str(base / name)]
            inside = [file for path in found for file in _files(filesystem, path)]
            paths = list({os.path.realpath(file): file for file in inside}.values())  # links
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{key}: {shown} cannot be opened: {_plainly(error, name)}") from None
    if not paths:
        where = "" if "://" in name else f" (looked in {base.resolve()})"
        raise DataError(f"{key}: no such file or folder, or none inside: {shown}{where}")
    formats = {_format(path) for path in paths}
    if None in formats or len(formats) > 1:
        odd = next((path for path in paths if _format(path) is None), paths[0])
        raise DataError(
            f"{key}: expected files of one format ({', '.join(sorted(FORMATS))}), found {odd}"
        )
    kind = str(formats.pop())
    try:
        schemas = {path: _schema(path, filesystem, kind) for path in paths}
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{key}: {shown} is no {kind} that can be read: {_plainly(error, name)}"
        ) from None
    first = schemas[paths[0]]
    for path, schema in schemas.items():
        if schema.remove_metadata() != first.remove_metadata():
            raise DataError(
                f"{key}: {path} and {paths[0]} have different columns or types:\n"
                + _difference(schema, first)
            )
    return ds.dataset(paths, filesystem=filesystem, format=READERS.get(kind, kind))


def _schema(path: str, filesystem: Any, kind: str) -> pa.Schema:
    return ds.dataset(path, filesystem=filesystem, format=READERS.get(kind, kind)).schema


def _files(filesystem: Any, path: str) -> list[str]:
    info = filesystem.get_file_info(path)
    if info.type == pafs.FileType.Directory:
        inside = filesystem.get_file_info(pafs.FileSelector(path, recursive=True))
        return sorted(
            item.path
            for item in inside
            if item.type == pafs.FileType.File and not item.base_name.startswith((".", "_"))
        )
    return [path] if info.type == pafs.FileType.File else []


def _format(path: str) -> str | None:
    name = path.lower().removesuffix(".gz").removesuffix(".zst")
    return next((kind for end, kind in FORMATS.items() if name.endswith(end)), None)


def _plainly(error: Exception, names: str | list[str]) -> str:
    """Arrow's message without the secrets of the URIs it repeats, and without its C++ lines."""
    text = str(error).partition("\n")[0]
    for name in [names] if isinstance(names, str) else names:
        text = text.replace(name, without_secrets(name))
    return text


def without_secrets(uri: str) -> str:
    """The URI without user, password and query."""
    scheme, separator, rest = uri.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2].partition('?')[0]}" if separator else uri


def _split(table: pa.Table, fraction: float, seed: int) -> tuple[pa.Table, pa.Table]:
    """Training and validation rows, each in their stored order."""
    num_validation = round(table.num_rows * fraction)
    if not 0 < num_validation < table.num_rows:
        raise DataError(
            f"data.validation: {fraction} of {table.num_rows} rows leaves "
            f"{num_validation} for validation and {table.num_rows - num_validation} for training"
        )
    generator = np.random.Generator(np.random.Philox(key=[seed % 2**64, 0]))
    held_out = np.zeros(table.num_rows, dtype=bool)
    held_out[generator.permutation(table.num_rows)[:num_validation]] = True
    return table.filter(pa.array(~held_out)), table.filter(pa.array(held_out))


def sample(key: str, name: str) -> pa.Table:
    """Real data that scikit-learn ships.

    diabetes: 442 patients, ten measurements, `progression` after a year (Efron et al., 2004).
    digits: 1797 grey images of 8 x 8 with `digit` (UCI, optical recognition of digits).
    breast_cancer: 569 tumours, thirty measurements, `diagnosis` (UCI, Wisconsin).
    """
    from sklearn import datasets

    if name == "digits":
        loaded = datasets.load_digits()
        shape = pa.fixed_shape_tensor(pa.float32(), (8, 8))
        flat = pa.FixedSizeListArray.from_arrays(
            pa.array(loaded.data.astype("float32").ravel()), 64
        )
        image = pa.ExtensionArray.from_storage(shape, flat)
        return pa.table({"image": image, "digit": loaded.target})
    if name == "diabetes":
        loaded = datasets.load_diabetes(scaled=False)
        columns = dict(zip(loaded.feature_names, loaded.data.T, strict=True))
        return pa.table({**columns, "progression": loaded.target})
    if name == "breast_cancer":
        loaded = datasets.load_breast_cancer()
        names = [str(column).replace(" ", "_") for column in loaded.feature_names]
        columns = dict(zip(names, loaded.data.T, strict=True))
        return pa.table({**columns, "diagnosis": loaded.target_names[loaded.target]})
    known = ["breast_cancer", "diabetes", "digits"]
    raise DataError(f"{key}: no sample {name!r}{nearest(name, known)}; known: {', '.join(known)}")
