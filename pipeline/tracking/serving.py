"""What `mlflow.pyfunc` runs: the trained model behind data frames; no code is unpickled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pyarrow as pa
from mlflow.exceptions import MlflowException

from pipeline.data.arrow import is_text
from pipeline.data.columns import Field
from pipeline.errors import DataError
from pipeline.inference.model import TrainedModel


class ServedModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """A trained model from a run's files."""

    def __init__(self, model: TrainedModel | None = None) -> None:
        self.model = model

    def load_context(self, context: Any) -> None:
        """Read what `log_model` stored."""
        self.model = TrainedModel.of_artifacts(Path(context.artifacts["spec"]).parent)

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """One row of predictions per row of raw input columns.

        Raises MlflowException, whose text a server passes on, for rows that it cannot take.
        """
        assert self.model is not None
        try:
            columns = {
                field.name: _arrow(model_input[field.name], field)
                for field in self.model.inputs
                if field.name in model_input
            }
            predictions = self.model.predict(columns, len(model_input))
        except DataError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error
        return pd.DataFrame(predictions, index=model_input.index)


def _arrow(cells: pd.Series[Any], field: Field) -> Any:
    """A column of cells of any pandas type as Arrow values; arrays become lists.

    Raises DataError for values of which Arrow knows no common type.
    """
    try:
        if cells.dtype == object:
            plain = [cell.tolist() if isinstance(cell, np.ndarray) else cell for cell in cells]
            array = pa.array(plain, from_pandas=True)
        else:
            array = pa.Array.from_pandas(cells)
    except (pa.ArrowException, OverflowError) as error:
        raise DataError(
            f"column {field.name!r} cannot be read as {field.arrow_type}: {error}"
        ) from None
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    return array.cast(pa.string()) if is_text(array.type) else array


mlflow.models.set_model(ServedModel())
