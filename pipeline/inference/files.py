"""Predictions of files: one Parquet file for each, its rows in their order, in bounded memory."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.arrow import plain
from pipeline.data.columns import column_errors
from pipeline.data.formats import dataset_of, datasets
from pipeline.data.locate import FORMATS, FileSet, locate_names
from pipeline.data.reader import Source, delimiter_hint
from pipeline.errors import DataError, UsageError
from pipeline.files.atomic import delete_temporaries, replacing
from pipeline.inference.model import MAX_ROWS, TrainedModel
from pipeline.registry import nearest
from pipeline.train.weights import weights_sha256

KEY = "FILES"
"""What the files are called in messages."""
MADE_BY = b"pipeline.made_by"
"""In a Parquet file's metadata: the model, the input, and the columns of the output."""


@dataclass(frozen=True)
class Task:
    """One file to predict."""

    source: Source
    output: Path
    made_by: str
    """What tells predictions that there are already from others: JSON."""

    def is_done(self, is_fresh: bool) -> bool:
        """Whether its output is there. Raises UsageError where something else is.

        With `is_fresh`, predictions that are there do not count.
        """
        if not self.output.exists():
            return False
        try:
            found = (pq.read_metadata(self.output).metadata or {}).get(MADE_BY)
        except (pa.ArrowException, OSError):
            found = None
        if found is None:
            raise UsageError(f"--out: {self.output} is there, and is not one of predictions")
        if is_fresh:
            return False
        if found.decode() != self.made_by:
            raise UsageError(
                f"--out: {self.output} holds other predictions (another model, other rows or other "
                "columns): give another folder, or --fresh to replace them"
            )
        return True


@dataclass(frozen=True)
class Plan:
    """All files to predict, of one schema."""

    tasks: list[Task]
    carried: list[str]
    """Columns of the files that stand before the predictions."""
    schema: pa.Schema
    """Of all outputs."""


def plan(
    model: TrainedModel, names: Sequence[str], base: Path, folder: Path, keep: Sequence[str] | None
) -> Plan:
    """Which files there are, where their predictions go, and of which columns and types.

    `keep` are the columns to carry along: unless given, all that the model neither reads nor
    predicts. Raises DataError for files that cannot be read or lack a column, before any row but
    the first few is read.
    """
    places, whole = _open(model, names, base)
    dataset = whole.dataset
    carried = _carried(model, dataset.schema, keep)
    whole = replace(whole, wanted=dict.fromkeys([*whole.inputs, *carried], KEY))
    schema = _schema(model, whole, carried)
    identity = {
        "weights": weights_sha256(model.objective.state_dict()),
        "spec": model.job.digest,
        "schema": str(schema),
    }
    tasks: dict[Path, Task] = {}
    files = [one for place in places for one in _single(place)]
    for file in files:
        source = replace(whole, dataset=dataset_of(file, dataset.schema))
        made_by = json.dumps({**identity, "input": file.stamp()}, sort_keys=True)
        task = Task(source, folder / _output_name(file), made_by)
        if task.output in tasks:
            raise UsageError(
                f"{KEY}: two files would be predicted into {task.output}: name each once, or give "
                "them folders of their own"
            )
        tasks[task.output] = task
    _refuse_inside(folder, places, files)
    return Plan(list(tasks.values()), carried, schema)


def first_rows(model: TrainedModel, names: Sequence[str], base: Path) -> pa.Table:
    """The first rows of files, with the columns that the model reads. Raises DataError."""
    block = next(iter(_open(model, names, base)[1].blocks()), None)
    if block is None:
        raise DataError(f"{KEY}: no rows in {', '.join(names)}")
    return block.table.slice(0, MAX_ROWS)


def _open(model: TrainedModel, names: Sequence[str], base: Path) -> tuple[list[FileSet], Source]:
    """The files, and in one source the columns that the model reads of them."""
    places = locate_names(KEY, list(names), base)
    dataset = datasets({KEY: places}, model.job.data.categorical)[KEY]
    shown = ", ".join(names)
    _check_types(model, dataset.schema, shown)
    read = [field.name for field in model.inputs if field.name in dataset.schema.names]
    wanted = dict.fromkeys(read, KEY)
    return places, Source(KEY, shown, dataset, wanted, read, True, [])


def _refuse_inside(folder: Path, places: Sequence[FileSet], files: Sequence[FileSet]) -> None:
    """Raise UsageError for a folder in which the next command would find its inputs."""
    above = {*folder.parents, folder}
    homes = {Path(os.path.realpath(path)).parent for file in files for path in file.paths}
    named = {Path(place.name).resolve() for place in places if Path(place.name).is_dir()}
    if folder in homes or above & named:
        raise UsageError(f"--out: {folder} is where the files are; give another folder")


def predict_file(
    model: TrainedModel, task: Task, plan: Plan, report: Callable[[int], None] = lambda _: None
) -> int:
    """Write the predictions of one file, whole or not at all; returns how many rows it has.

    `report` is told of each block of rows. Raises DataError naming file and row.
    """
    num_rows = 0
    schema = plan.schema.with_metadata({MADE_BY: task.made_by.encode()})
    task.output.parent.mkdir(parents=True, exist_ok=True)
    delete_temporaries(task.output)
    with replacing(task.output) as file, pq.ParquetWriter(file, schema) as writer:
        for table in _predictions(model, task.source, plan):
            writer.write_table(table.replace_schema_metadata(schema.metadata))
            num_rows += len(table)
            report(len(table))
    return num_rows


def _predictions(model: TrainedModel, source: Source, plan: Plan) -> Iterator[pa.Table]:
    """The carried columns and the predictions of each block of rows."""
    for block in source.blocks():
        columns = {name: block.table[name] for name in block.table.column_names}
        predicted = model.predict(columns, len(block.table), block.row_name)
        types = {name: plan.schema.field(name).type for name in predicted}
        arrays = {name: pa.array(values, types[name]) for name, values in predicted.items()}
        kept = {name: columns[name] for name in plan.carried}
        yield pa.table({**kept, **arrays})


def _schema(model: TrainedModel, source: Source, carried: Sequence[str]) -> pa.Schema:
    """Names and types of an output's columns, as the first rows give them."""
    block = next(iter(source.blocks()), None)
    if block is None:
        raise DataError(f"{KEY}: no rows in {source.shown}")
    ends = [piece.start_in_block for piece in block.slices[1:]]  # of the first file alone
    first = block.table.slice(0, min([MAX_ROWS, *ends]))
    given = {name: first[name] for name in first.column_names}
    predicted = model.predict(given, len(first), block.row_name)
    if twice := [name for name in carried if name in predicted]:
        raise UsageError(f"--keep: {', '.join(twice)} is what the model predicts")
    kept = [block.table.schema.field(name) for name in carried]
    types = [(name, _with_numbers(pa.array(values).type)) for name, values in predicted.items()]
    schema = pa.schema([*kept, *types])
    try:
        pq.write_table(schema.empty_table(), io.BytesIO())
    except pa.ArrowException as error:
        raise UsageError(f"--keep: Parquet cannot hold these columns: {error}") from None
    return schema


def _with_numbers(kind: pa.DataType) -> pa.DataType:
    """The type of predictions of which the first rows have none, as those of empty lists."""
    if pa.types.is_list(kind):
        return pa.list_(_with_numbers(kind.value_type))
    return pa.float64() if pa.types.is_null(kind) else kind


def _carried(model: TrainedModel, schema: pa.Schema, keep: Sequence[str] | None) -> list[str]:
    names = list(schema.names)
    if keep is None:
        others = {field.name for field in model.fields}
        return [name for name in names if name not in others and names.count(name) == 1]
    for name in keep:
        if names.count(name) != 1:
            problem = "stands twice there" if name in names else "is not there"
            raise UsageError(f"--keep: column {name!r} {problem}{nearest(name, names)}")
    return list(dict.fromkeys(keep))


def _check_types(model: TrainedModel, schema: pa.Schema, shown: str) -> None:
    """Refuse files whose columns the model cannot read, by their types alone."""
    for field in model.inputs:
        if schema.names.count(field.name) > 1:
            raise DataError(f"{shown}: column {field.name!r} stands twice")
        try:
            model.input_of(dict.fromkeys(schema.names, None), field, 0)
        except DataError as error:
            raise DataError(f"{shown}: {error}{delimiter_hint(schema.names)}") from None
        if field.name in schema.names:
            with column_errors(f"{shown}: column {field.name!r}"):
                field.from_cells(plain(pa.array([], schema.field(field.name).type)))


def _output_name(file: FileSet) -> str:
    """What a file's predictions are called: as the file, below the folder that was named."""
    name = file.below(file.paths[0]) if file.paths else file.name.partition(":")[2]
    shown = name.removesuffix(".gz").removesuffix(".zst")
    known = next((end for end in FORMATS if shown.lower().endswith(end)), "")
    return f"{shown[: len(shown) - len(known)]}.parquet"


def _single(place: FileSet) -> list[FileSet]:
    """Each file by itself; a sample has none."""
    return [replace(place, paths=[path]) for path in place.paths] or [place]


def pending(plan: Plan, is_fresh: bool) -> list[Task]:
    """The tasks that are left to do; all of them, if what there is shall be replaced."""
    return [task for task in plan.tasks if not task.is_done(is_fresh)]
