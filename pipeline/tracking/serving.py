"""What `mlflow.pyfunc` runs: preprocessing, model, inverse link; no code is unpickled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from mlflow.exceptions import MlflowException

from pipeline import plugins, spec
from pipeline.data.arrow import is_text
from pipeline.data.batch import Batch, Ragged
from pipeline.data.columns import Field, column_errors, encode, from_json
from pipeline.data.dataset import build_dataset
from pipeline.errors import DataError
from pipeline.losses.objective import Objective
from pipeline.losses.terms import Term
from pipeline.registry import nearest
from pipeline.train.build import build_objective
from pipeline.train.weights import load_weights, take_weights

MAX_ROWS = 1024
"""That are computed at once, however many there are."""
NUM_DIMS_OF_LISTS = 3
"""Of predictions [N, C, L] for each position of a list."""


class ServedModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """A trained model from a run's files."""

    def load_context(self, context: Any) -> None:
        """Read what `log_model` stored."""
        self._read(context.artifacts)

    @classmethod
    def load(cls, artifacts: dict[str, str]) -> ServedModel:
        """The model from the files' paths, without MLflow around it."""
        model = cls()
        model._read(artifacts)
        return model

    def _read(self, artifacts: dict[str, str]) -> None:
        folder = Path(artifacts["spec"]).parent / "imports"
        plugins.receive(json.loads(Path(artifacts["imports"]).read_text()), folder)
        job = spec.load(artifacts["spec"])
        fields = [from_json(f) for f in json.loads(Path(artifacts["fields"]).read_text())]
        self.shift = job.data.shift
        self.inputs = [field for field in fields if field.is_input]
        model = job.model.model_copy(update={"lora": None})  # whose products are in the weights
        self.objective: Objective = build_objective(job.model_copy(update={"model": model}), fields)
        take_weights(self.objective, load_weights(Path(artifacts["weights"])))
        self.objective.eval()

    def _column(self, rows: pd.DataFrame, field: Field) -> Any:
        if field.name in rows:
            return _arrow(rows[field.name], field)
        if field.is_optional:
            return _arrow(pd.Series([None] * len(rows), dtype=object), field)
        known = ", ".join(one.name for one in self.inputs)
        raise DataError(
            f"column {field.name!r} is not among those given{nearest(field.name, rows.columns)}; "
            f"the model reads {known}"
        )

    def _lengths(self, term: Term, batch: Batch) -> list[int]:
        """How many positions each row has: those of the list that its target is made of, or else of
        the only list there is; nothing where that is not known."""
        if len(term.targets) != 1 or not term.targets[0].is_list:
            return []
        lists = [name for name, column in batch.items() if isinstance(column, Ragged)]
        source = self.shift.get(term.targets[0].name, lists[0] if len(lists) == 1 else "")
        column = batch.get(source)
        return column.lengths.tolist() if isinstance(column, Ragged) else []

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """One row of predictions per row of raw input columns.

        Raises MlflowException, whose text a server passes on, for rows that it cannot take.
        """
        starts = range(0, max(len(model_input), 1), MAX_ROWS)
        parts = [model_input[start : start + MAX_ROWS] for start in starts]
        try:
            return pd.concat([self._predict(part) for part in parts])
        except DataError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error

    def _predict(self, model_input: pd.DataFrame) -> pd.DataFrame:
        """The predictions of so many rows as are computed at once."""
        columns = {field.name: self._column(model_input, field) for field in self.inputs}
        kind = np.float64 if self.objective.precision == torch.float64 else np.float32
        encoded = encode(self.inputs, pa.table(columns), float_dtype=kind)
        dataset = build_dataset(self.inputs, encoded, len(model_input), kind)
        batch = dataset.gather(np.arange(len(model_input)))
        columns_out: dict[str, Any] = {}
        with torch.inference_mode():
            predictions = self.objective.predict(batch)
            for index, term in enumerate(self.objective.terms):
                served = term.served(self.objective.head(index), predictions)
                is_lists = served.dim() == NUM_DIMS_OF_LISTS
                lengths = self._lengths(term, batch) if is_lists else []
                for name, values in term.target.decode(term, served).items():
                    if lengths:
                        values = _cut(values, lengths)
                    columns_out[f"{name}_{term.label}" if name in columns_out else name] = values
        return pd.DataFrame(columns_out, index=model_input.index)


def _cut(rows: list[Any], lengths: Sequence[int]) -> list[Any]:
    """Numbers [C, L] of each row, without those of positions that only longer rows have."""
    return [
        [positions[:length] for positions in row] for row, length in zip(rows, lengths, strict=True)
    ]


def _arrow(cells: pd.Series[Any], field: Field) -> Any:
    """A column of cells of any pandas type, as the training rows had it; arrays become lists.

    Raises DataError for text where numbers were, and the other way round.
    """
    where = f"column {field.name!r}"
    try:
        if cells.dtype == object:
            plain = [cell.tolist() if isinstance(cell, np.ndarray) else cell for cell in cells]
            array = pa.array(plain, from_pandas=True)
        else:
            array = pa.Array.from_pandas(cells)
    except (pa.ArrowException, OverflowError) as error:
        raise DataError(f"{where} cannot be read as {field.arrow_type}: {error}") from None
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if is_text(array.type):
        array = array.cast(pa.string())
    with column_errors(where):
        return field.from_cells(array)


mlflow.models.set_model(ServedModel())
