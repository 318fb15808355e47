"""What `mlflow.pyfunc` runs: preprocessing, model, inverse link; no code is unpickled."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from pipeline import plugins, specfile
from pipeline.data.columns import SINGLE, Field, encode
from pipeline.data.store import in_memory
from pipeline.errors import DataError
from pipeline.losses.objective import Objective
from pipeline.registry import nearest
from pipeline.train.job import objective
from pipeline.train.weights import load_weights, take_weights


class Served(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """A trained model from a run's files."""

    def load_context(self, context: Any) -> None:
        """Read what `log_model` stored."""
        self._read(context.artifacts)

    @classmethod
    def load(cls, artifacts: dict[str, str]) -> Served:
        """The model from the files' paths, without MLflow around it."""
        made = cls()
        made._read(artifacts)
        return made

    def _read(self, artifacts: dict[str, str]) -> None:
        folder = Path(artifacts["spec"]).parent / "imports"
        plugins.receive(json.loads(Path(artifacts["imports"]).read_text()), folder)
        job = specfile.load(artifacts["spec"])
        fields = [Field.from_json(f) for f in json.loads(Path(artifacts["fields"]).read_text())]
        self.inputs = [field for field in fields if field.is_input]
        self.objective: Objective = objective(job, fields)
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

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """One row of predictions per row of raw input columns."""
        columns = {field.name: self._column(model_input, field) for field in self.inputs}
        kind = np.float64 if self.objective.precision == torch.float64 else np.float32
        encoded = encode(self.inputs, pa.table(columns), fraction=kind)
        store = in_memory(self.inputs, encoded, len(model_input), kind)
        batch = store.gather(np.arange(len(model_input)))
        found: dict[str, Any] = {}
        with torch.inference_mode():
            predictions = self.objective.predict(batch)
            for number, term in enumerate(self.objective.terms):
                served = term.served(self.objective.head(number), predictions)
                for name, values in term.target.decode(term, served).items():
                    found[f"{name}_{term.label}" if name in found else name] = values
        return pd.DataFrame(found, index=model_input.index)


def _arrow(cells: pd.Series[Any], field: Field) -> Any:
    """A column of cells of any pandas type, as the training rows had it; arrays become lists.

    Raises DataError for text where numbers were, and the other way round.
    """
    where = f"column {field.name!r}"
    try:
        if cells.dtype == object:
            plain = [cell.tolist() if isinstance(cell, np.ndarray) else cell for cell in cells]
            found = pa.array(plain, from_pandas=True)
        else:
            found = pa.Array.from_pandas(cells)
    except (pa.ArrowException, OverflowError) as error:
        raise DataError(f"{where} cannot be read as {field.arrow_type}: {error}") from None
    if pa.types.is_dictionary(found.type):
        found = found.dictionary_decode()
    if pa.types.is_large_string(found.type):
        found = found.cast(pa.string())
    if field.kind == "date" and (_is_text(found.type) or getattr(found.type, "tz", None)):
        for kind in (pa.timestamp("us"), pa.timestamp("us", "UTC")):  # text with a zone or without
            with contextlib.suppress(pa.ArrowException):
                return found.cast(kind, safe=False).cast(pa.timestamp("us"))  # in UTC
        raise DataError(f"{where} holds text that is no date, such as {found.drop_null()[0]}")
    if not pa.types.is_null(found.type):
        if field.kind == "number" and _is_text(found.type):
            raise DataError(f"{where} is {found.type}, expected numbers, as {field.arrow_type}")
        is_single = field.kind in SINGLE and bool(field.vocabulary)
        if is_single and isinstance(field.vocabulary[0], str) != _is_text(found.type):  # type: ignore[index]
            trained = f"{field.arrow_type}, such as {field.vocabulary[0]!r}"  # type: ignore[index]
            raise DataError(f"{where} is {found.type}; the training rows had {trained}")
        return found
    known = pa.array(field.vocabulary or [0.0 if field.kind != "tokens" else 0]).type
    if field.kind == "date":
        known = pa.timestamp("us")
    return found.cast(known if field.kind in (*SINGLE, "date") else pa.list_(known))


def _is_text(kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


mlflow.models.set_model(Served())
