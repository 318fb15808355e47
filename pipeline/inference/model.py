"""A trained model out of a run's files: raw columns in, predictions in the target's terms out."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline import plugins, spec
from pipeline.data.arrow import plain
from pipeline.data.batch import Batch, Ragged, to_device
from pipeline.data.columns import Field, FloatType, RowName, column_errors, encode, from_json
from pipeline.data.dataset import Dataset, build_dataset
from pipeline.errors import DataError
from pipeline.losses.terms import Term
from pipeline.registry import nearest
from pipeline.rundir import RunDir
from pipeline.rundir.records import Record
from pipeline.spec import JobSpec
from pipeline.train.build import build_objective
from pipeline.train.weights import load_weights, take_weights

MAX_ROWS = 1024
"""That are computed at once, however many there are."""
NUM_DIMS_OF_LISTS = 3
"""Of predictions [N, C, L] for each position of a list."""


class TrainedModel:
    """Model and losses of a job, with trained weights, in evaluation."""

    def __init__(self, job: JobSpec, fields: list[Field], weights: Mapping[str, Tensor]) -> None:
        """The custom modules that the job names are imported already."""
        self.job = job
        self.fields = fields
        self.inputs = [field for field in fields if field.is_read]
        model = job.model.model_copy(update={"lora": None})  # whose products are in the weights
        self.objective = build_objective(job.model_copy(update={"model": model}), fields)
        take_weights(self.objective, weights)
        self.objective.eval()
        self.device = torch.device("cpu")
        self.example: pa.Table | None = None
        """A few raw training rows."""

    @classmethod
    def of_run(cls, run: RunDir) -> Self:
        """The model of a finished run."""
        record = Record.read(run.record)
        plugins.receive(record.modules, run.imports)
        fields = [from_json(field) for field in record.fields]
        model = cls(spec.load(run.spec), fields, load_weights(run.weights))
        model.example = pa.ipc.open_file(base64.b64decode(record.example)).read_all()
        return model

    @classmethod
    def of_artifacts(cls, folder: Path) -> Self:
        """The model in a folder with `spec.yaml`, `fields.json`, `imports.json`, `weights.pt`, as
        MLflow keeps it: custom modules are in `code` beside it."""
        plugins.receive(json.loads((folder / "imports.json").read_text()), folder.parent / "code")
        fields = [from_json(field) for field in json.loads((folder / "fields.json").read_text())]
        return cls(spec.load(folder / "spec.yaml"), fields, load_weights(folder / "weights.pt"))

    def to(self, device: torch.device) -> Self:
        """The model on this device from now on."""
        self.objective.to(device)
        self.device = device
        return self

    @property
    def float_dtype(self) -> FloatType:
        """What numbers are stored as, on their way to the model."""
        return np.float64 if self.objective.precision == torch.float64 else np.float32

    def input_of(self, columns: Mapping[str, Any], field: Field, num_rows: int) -> Any:
        """The column that an input reads, missing values where it is optional and not there.

        Raises DataError for one that is absent.
        """
        if field.name in columns:
            return columns[field.name]
        if field.is_optional:
            return pa.nulls(num_rows)
        known = ", ".join(one.name for one in self.inputs)
        raise DataError(
            f"column {field.name!r} is not among those given{nearest(field.name, columns)}; "
            f"the model reads {known}"
        )

    def predict(
        self, columns: Mapping[str, Any], num_rows: int, row_name: RowName = str
    ) -> dict[str, Any]:
        """The predictions of so many rows by name: lists or arrays, one entry a row.

        `columns` are Arrow arrays of raw values by name. Raises DataError for those that the model
        cannot take, with the rows as `row_name` calls them.
        """
        dataset = self._dataset(columns, num_rows, row_name)
        parts = [
            self._decode(dataset.gather(np.arange(start, min(start + MAX_ROWS, num_rows))))
            for start in range(0, max(num_rows, 1), MAX_ROWS)
        ]
        return {name: _joined([part[name] for part in parts]) for name in parts[0]}

    def batch_of(self, rows: pa.Table) -> Batch:
        """All rows of a table as the model takes them."""
        columns = {name: rows[name] for name in rows.column_names}
        return self._dataset(columns, len(rows), str).gather(np.arange(len(rows)))

    def _dataset(self, columns: Mapping[str, Any], num_rows: int, row_name: RowName) -> Dataset:
        read = {}
        for field in self.inputs:
            array = plain(self.input_of(columns, field, num_rows))
            with column_errors(f"column {field.name!r}", row_name):
                read[field.name] = field.from_cells(array)
        encoded = encode(self.inputs, pa.table(read), None, self.float_dtype, row_name)
        return build_dataset(self.inputs, encoded, num_rows, self.float_dtype)

    @torch.inference_mode()
    def _decode(self, batch: Batch) -> dict[str, Any]:
        """The predictions of the rows that are computed at once."""
        columns: dict[str, Any] = {}
        predictions = self.objective.predict(to_device(batch, self.device))
        for index in range(len(self.objective.terms)):
            term = self.objective.with_threshold(index)
            served = self.objective.served(index, predictions).cpu()
            is_lists = served.dim() == NUM_DIMS_OF_LISTS
            lengths = self._lengths(term, batch) if is_lists else []
            for name, values in term.target.decode(term, served).items():
                if lengths:
                    values = _cut(values, lengths)
                columns[f"{name}_{term.label}" if name in columns else name] = values
        return columns

    def _lengths(self, term: Term, batch: Batch) -> list[int]:
        """How many positions each row has: those of the list that its target is made of, or else of
        the only list there is; nothing where that is not known."""
        if len(term.targets) != 1 or not term.targets[0].is_list:
            return []
        lists = [name for name, column in batch.items() if isinstance(column, Ragged)]
        shift = self.job.data.shift
        source = shift.get(term.targets[0].name, lists[0] if len(lists) == 1 else "")
        column = batch.get(source)
        return column.lengths.tolist() if isinstance(column, Ragged) else []


def _cut(rows: list[Any], lengths: Sequence[int]) -> list[Any]:
    """Numbers [C, L] of each row, without those of positions that only longer rows have."""
    return [
        [positions[:length] for positions in row] for row, length in zip(rows, lengths, strict=True)
    ]


def _joined(parts: list[Any]) -> Any:
    if all(isinstance(part, np.ndarray) for part in parts):
        return np.concatenate(parts)
    return [value for part in parts for value in part]
