"""From files to blocks of Arrow rows, in order and in bounded memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from pipeline.data.blocks import Block, FileSlice, GroupId, RowGroups
from pipeline.data.formats import datasets
from pipeline.data.locate import DataFiles, FileSet, plainly
from pipeline.errors import DataError
from pipeline.redact import redact
from pipeline.registry import nearest
from pipeline.spec.data import Data

INDEX = re.compile(r"__index_level_\d+__|Unnamed: \d+")
SMALLEST_BLOCK = 64
LARGEST_BLOCK = 2**16
BLOCK_BYTES = 2**25
LIST_BYTES = 2**10
"""What a value of no fixed size is taken for."""


_Read = tuple[pa.RecordBatch, FileSlice]


@dataclass(frozen=True)
class Source:
    """The rows that one key of the spec names, and the columns of them that it uses."""

    key: str
    shown: str
    dataset: ds.Dataset
    wanted: dict[str, str]
    """Columns, each with the key that asks for it."""
    inputs: list[str]
    has_several_files: bool
    """Whether rows are named by their files, of which there are several."""
    passed: list[str]
    """Columns of pandas' index, which are not inputs."""

    @property
    def split(self) -> str:
        """The split that its key is named after."""
        return self.key.removeprefix("data.")

    @property
    def schema(self) -> pa.Schema:
        """Names and types of the columns that are used."""
        return pa.schema([self.dataset.schema.field(name) for name in self.wanted])

    @property
    def block_rows(self) -> int:
        """Rows of one block: of the columns' types alone, whatever the files."""
        width = sum(_width(field.type) for field in self.schema)
        fitting = 2 ** int(np.log2(max(1, BLOCK_BYTES // max(1, width))))
        return int(min(LARGEST_BLOCK, max(SMALLEST_BLOCK, fitting)))

    def where(self, column: str) -> str:
        """The column, after the key that asks for it; for messages."""
        others = self.key if "." in self.key else self.shown  # files of a command have no key
        of = "" if self.key == "data.train" else f" of {others}"
        return f"{self.wanted[column]}: column {column!r}{of}"

    def blocks(self, every: int | None = None) -> Iterator[Block]:
        """All rows in order, in blocks of `block_rows` rows and a shorter last one.

        With `every`, blocks end at each multiple of so many rows too. Raises DataError naming the
        file that cannot be read.
        """
        return self._cut(self._batches(), 0, every)

    def read(self, groups: RowGroups, rows: range) -> Iterator[Block]:
        """The blocks of these rows only, from the row groups that hold them."""
        first = int(groups.starts[groups.overlapping(rows)[0]])
        return self._cut(self._trim(groups, rows, first), rows.start, None)

    def _trim(self, groups: RowGroups, rows: range, at: int) -> Iterator[_Read]:
        wanted = [groups.ids[index] for index in groups.overlapping(rows)]
        for batch, piece in self._batches(wanted):
            start = max(rows.start - at, 0)
            end = min(rows.stop - at, len(batch))
            if start < end:
                row = groups.row_in_file(at + start, piece.group[0])
                yield batch.slice(start, end - start), replace(piece, start_in_file=row)
            at += len(batch)
            if at >= rows.stop:
                return

    def _cut(self, batches: Iterator[_Read], first: int, every: int | None) -> Iterator[Block]:
        held: list[pa.Table] = []
        slices: list[FileSlice] = []
        num_held = 0
        end = self._end(first, every)
        for batch, piece in batches:
            table = pa.Table.from_batches([batch])
            start = 0
            while start < len(table):
                some = table.slice(start, end - first - num_held)
                row = piece.start_in_file + start
                slices.append(replace(piece, start_in_block=num_held, start_in_file=row))
                held.append(some)
                start += len(some)
                num_held += len(some)
                if first + num_held == end:
                    yield Block(pa.concat_tables(held), first, slices, self.has_several_files)
                    first = end
                    num_held = 0
                    held = []
                    slices = []
                    end = self._end(first, every)
        if held:
            yield Block(pa.concat_tables(held), first, slices, self.has_several_files)

    def _end(self, first: int, every: int | None) -> int:
        """Where the block ends that begins with row `first`."""
        end = first + self.block_rows
        return min(end, (first // every + 1) * every) if every else end

    def _batches(self, wanted: Sequence[GroupId] | None = None) -> Iterator[_Read]:
        """Record batches, all or those of some row groups, each with where its rows are from."""
        path = ""
        columns = list(self.wanted)
        from_file: dict[int, set[int]] = {}
        for file, group in wanted or ():
            from_file.setdefault(file, set()).add(group)
        try:
            for file, fragment in enumerate(self.dataset.get_fragments()):
                path = getattr(fragment, "path", "")
                row = 0
                if wanted is not None and file not in from_file:
                    continue
                read = _read(
                    fragment, self.dataset.schema, columns, self.block_rows, from_file.get(file)
                )
                for batch, group in read:
                    yield _replace_views(batch), FileSlice(0, path, row, (file, group))
                    row += len(batch)
        except (pa.ArrowException, OSError, ValueError) as error:
            after = f" (at or after {path})" if path else ""
            raise DataError(
                f"{self.key}: {self.shown} cannot be read{after}: {plainly(error, self.shown)}"
            ) from None


def _read(
    fragment: Any, schema: pa.Schema, columns: list[str], rows: int, wanted: set[int] | None
) -> Iterator[tuple[Any, int]]:
    """Record batches of one file, in bounded memory: a plain scan reads as far ahead as it can.

    Each comes with the index of its row group; with `wanted`, only those groups are read.
    """
    if isinstance(getattr(fragment, "format", None), ds.IpcFileFormat):
        with fragment.filesystem.open_input_file(fragment.path) as file:
            reader = pa.ipc.open_file(file)
            for group in range(reader.num_record_batches):
                if wanted is None or group in wanted:
                    batch = reader.get_batch(group).select(columns)
                    yield batch.cast(pa.schema([schema.field(name) for name in columns])), group
        return
    is_parquet = isinstance(fragment, ds.ParquetFileFragment)
    is_csv = isinstance(getattr(fragment, "format", None), ds.CsvFileFormat)
    for group, part in enumerate(fragment.split_by_row_group() if is_parquet else [fragment]):
        if wanted is not None and group not in wanted:
            continue
        batches = part.to_batches(
            schema=schema,
            columns=columns,
            batch_size=rows,
            batch_readahead=1,
            fragment_readahead=1,
        )
        for batch in batches:
            yield _empty_text_to_missing(batch) if is_csv else batch, group


def _replace_views(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Views of text as text: Arrow has no way to take rows of them."""
    views = [pa.types.is_string_view(column.type) for column in batch.columns]
    if not any(views):
        return batch
    columns = [
        column.cast(pa.large_string()) if is_view else column
        for column, is_view in zip(batch.columns, views, strict=True)
    ]
    return pa.RecordBatch.from_arrays(columns, batch.schema.names)


def _empty_text_to_missing(batch: pa.RecordBatch) -> pa.RecordBatch:
    """An empty cell of text as a missing value, as it is in other columns; "NA" is a text."""
    columns = [
        pc.if_else(pc.equal(column, ""), pa.scalar(None, column.type), column)
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
        else column
        for column in batch.columns
    ]
    return pa.RecordBatch.from_arrays(columns, batch.schema.names)


def _width(kind: pa.DataType) -> int:
    if isinstance(kind, pa.BaseExtensionType):
        return _width(kind.storage_type)
    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size) * _width(kind.value_type)
    try:
        return max(1, int(kind.bit_width) // 8)
    except ValueError:
        return LIST_BYTES


def open_sources(located: DataFiles) -> dict[str, Source]:
    """The rows of each split that has files of its own; `train` first.

    Of Parquet and Arrow files only schemas are read, CSV files are read through. Raises DataError
    naming the key, the file and the column.
    """
    data = located.data
    places = {f"data.{split}": of_split for split, of_split in located.places.items()}
    opened = datasets(places, data.categorical)
    train = _open_files(data, "data.train", opened["data.train"], places["data.train"])
    sources = {"train": train}
    # other files may have more columns, and need none that the training rows are split by
    same = {"inputs": train.inputs, "validation": None, "test": None}
    for key in [key for key in places if key != "data.train"]:
        source = _open_files(data.model_copy(update=same), key, opened[key], places[key])
        for name in source.wanted:
            column = source.schema.field(name)
            there = train.schema.field(name)
            if column.type != there.type:
                raise DataError(
                    f"{key}: column {name!r} is {column.type}, in data.train it is {there.type}; "
                    "if these are names, list it in data.categorical"
                )
        sources[source.split] = source
    return sources


def open_table(data: Data, table: pa.Table) -> Source:
    """The training rows of `data`, which are in memory already."""
    return select_columns(
        data, "data.train", ds.dataset(table), "the table", has_several_files=False
    )


def _open_files(data: Data, key: str, dataset: ds.Dataset, places: list[FileSet]) -> Source:
    shown = ", ".join(redact(place.name) for place in places)
    has_several_files = sum(len(place.paths) for place in places) > 1
    return select_columns(data, key, dataset, shown, has_several_files)


def select_columns(
    data: Data, key: str, dataset: ds.Dataset, shown: str, has_several_files: bool
) -> Source:
    """The source with the columns that are used. Raises DataError for one that is not there."""
    columns = dataset.schema.names
    named = {*data.categorical, *data.dates, *data.images, *data.tokenizers, *data.targets}
    passed = [] if data.inputs else [n for n in indices(dataset.schema) if n not in named]
    inputs = data.inputs or [name for name in _default_inputs(data, columns) if name not in passed]
    if not inputs:
        raise DataError(f"data.inputs: {shown} has no column besides the target")
    if any(not name.strip() for name in (*inputs, *data.targets)):
        raise DataError(f"data.inputs: a column of {shown} has no name: give it one in its file")
    wanted = _wanted_columns(data, inputs, columns, shown)
    if faults := list(_name_faults(data, inputs, columns, wanted, shown)):
        known = (
            f"\n  columns: {', '.join(c or repr(c) for c in columns[:50])}{delimiter_hint(columns)}"
        )
        raise DataError("\n".join(faults) + known)
    return Source(key, shown, dataset, wanted, inputs, has_several_files, passed)


def _name_faults(
    data: Data, inputs: list[str], columns: list[str], wanted: dict[str, str], shown: str
) -> Iterator[str]:
    """What the spec says of columns that are not there, or have no such part."""
    absent = {column for column in wanted if column not in columns}
    present = [column for column in wanted if column not in absent]
    for column, at in wanted.items():
        if column in absent:
            yield f"{at}: no column {column!r} in {shown}{nearest(column, columns)}"
        if columns.count(column) > 1:
            yield f"{at}: column {column!r} stands twice in {shown}"
    about: dict[str, Any] = {
        "categorical": data.categorical,
        "dates": data.dates,
        "images": data.images,
        "tokenizers": data.tokenizers,
        "scale": data.scale,
    }
    for name, listed in about.items():
        for column in listed if not isinstance(listed, str) else ():
            if column not in inputs:
                near = nearest(column, [one for one in inputs if one not in absent])
                yield f"data.{name}: {column!r} is not an input column{near}"
    for column in data.target_scale if isinstance(data.target_scale, dict) else ():
        if column not in data.targets:
            yield f"data.target_scale: {column!r} is not a target{nearest(column, data.targets)}"
    for column in data.positive:
        if column not in data.targets:
            yield f"data.positive: {column!r} is not a target{nearest(column, data.targets)}"
    for column in data.missing if isinstance(data.missing, dict) else ():
        if column not in wanted:
            yield f"data.missing: {column!r} is not a column that is used{nearest(column, present)}"


def _default_inputs(data: Data, columns: list[str]) -> list[str]:
    """All columns that have no other part: target, weight, or what a split goes by."""
    others = {column for column in data.targets if column not in data.shift}
    others |= {*data.weight_columns, *data.split_columns}
    others -= {*data.categorical, *data.dates}
    return [column for column in columns if column not in others]


def _wanted_columns(
    data: Data, inputs: list[str], columns: list[str], shown: str
) -> dict[str, str]:
    wanted: dict[str, str] = dict.fromkeys(inputs, "data.inputs")
    for column in data.targets:
        if column not in data.shift:
            wanted.setdefault(column, "data.target")
    for column, key in data.weight_columns.items():
        wanted.setdefault(column, key)
    for new, column in data.shift.items():
        if new not in data.targets:
            raise DataError(f"data.shift.{new}: is not named in data.target")
        if new in columns:
            raise DataError(f"data.shift.{new}: is a column of {shown}; give the target a new name")
        wanted.setdefault(column, f"data.shift.{new}")
    for column, key in data.split_columns.items():
        wanted.setdefault(column, key)
    return wanted


def delimiter_hint(columns: list[str]) -> str:
    """That a CSV file was read with another delimiter than it has; or nothing."""
    odd = next((c for c in ";\t|" if len(columns) == 1 and c in columns[0]), None)
    return (
        f"\n  one column only: CSV files are read with commas, this one has {odd!r}" if odd else ""
    )


def indices(schema: pa.Schema) -> list[str]:
    """Columns that hold pandas' index: in Parquet by its own word, in CSV by the names it gives.

    They tell the order of the rows, which a model must not read unless asked.
    """
    try:
        listed = json.loads((schema.metadata or {}).get(b"pandas", b"{}")).get("index_columns", [])
    except ValueError:
        listed = []
    return [
        name for name in schema.names if name in listed or not name.strip() or INDEX.fullmatch(name)
    ]
