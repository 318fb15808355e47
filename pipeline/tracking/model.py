"""The trained model in MLflow: raw columns in, predictions in the target's own terms out."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

import pipeline
from pipeline.data.columns import Field, from_json
from pipeline.errors import UsageError
from pipeline.redact import redact
from pipeline.rundir import RunDir
from pipeline.rundir.records import Record
from pipeline.tracking.client import Client, prepare_environment
from pipeline.tracking.names import environment_uri, with_password

WEIGHTS = "weights.pt"


def log_model(run: RunDir, model_id: str, record: Record) -> tuple[str, list[str]]:
    """Log the run's model, made before, with signature and input example.

    Returns its URI, and the columns that it gives.

    There is no active run: MLflow would read the whole history of each of its metrics to find those
    of one step.
    """
    import mlflow
    import pandas as pd

    from pipeline.inference.model import TrainedModel
    from pipeline.tracking.serving import ServedModel

    if not run.is_intact:
        raise ValueError(f"{run.weights} is damaged; the same command makes it again")
    example = pa.ipc.open_file(base64.b64decode(record.example)).read_all()
    frame = pd.DataFrame({name: cells(example[name]) for name in example.column_names})
    has_imports = run.imports.exists()
    custom = [str(path) for path in sorted(run.imports.iterdir())] if has_imports else []
    packages = ("torch", "numpy", "pandas", "pyarrow", "pydantic", "pyyaml")
    with tempfile.TemporaryDirectory() as name:
        texts = {
            "spec": record.spec,
            "fields": json.dumps(record.fields),
            "imports": json.dumps(record.modules),
        }
        artifacts = {"weights": str(run.weights)}
        for kind, text in texts.items():
            path = Path(name) / f"{kind}.{'yaml' if kind == 'spec' else 'json'}"
            path.write_text(text, encoding="utf-8")
            artifacts[kind] = str(path)
        predicted = ServedModel(TrainedModel.of_run(run)).predict(None, frame)
        fields = [from_json(field) for field in record.fields]
        with _unchecked_requirements():
            info = mlflow.pyfunc.log_model(
                name="model",
                model_id=model_id,
                python_model=str(Path(__file__).with_name("serving.py")),
                artifacts=artifacts,
                code_paths=[str(Path(pipeline.__file__).parent), *custom],
                signature=_signature(frame, predicted, fields),
                input_example=frame.astype(object).where(frame.notna(), None),  # JSON knows no NaN
                pip_requirements=[f"{name}=={_released_version(name)}" for name in packages],
            )
    return str(info.model_uri), list(predicted.columns)


@contextlib.contextmanager
def _unchecked_requirements() -> Iterator[None]:
    """MLflow does not look whether what is installed here meets them, which it does exactly.

    It would read what every installed package says of itself, for over a second.
    """
    from mlflow.utils import requirements_utils

    name = "_check_requirement_satisfied"
    before = getattr(requirements_utils, name, None)
    if before is None:  # in another version of MLflow
        yield
        return
    setattr(requirements_utils, name, lambda requirement: None)
    try:
        yield
    finally:
        setattr(requirements_utils, name, before)


def _released_version(package: str) -> str:
    """Its version as an index has it: without what names a build, such as `+cpu`."""
    return version(package).partition("+")[0]


def _signature(frame: Any, predicted: Any, fields: list[Field]) -> Any:
    """Names and types of the inputs, which of them may be absent, and the predictions' types.

    MLflow takes a type to the letter: a column of fractions that happen to be whole is refused, as
    is one of pandas' categories. Of columns of single values the model itself says what they may
    hold, with the column's name.
    """
    from mlflow.models import ModelSignature, infer_signature
    from mlflow.types import ColSpec, Schema
    from mlflow.types.schema import AnyType

    inputs = {field.name: field for field in fields if field.is_read}
    others = [name for name in frame.columns if not inputs[name].is_cell]
    known = {}
    if others:
        known = {one.name: one.type for one in infer_signature(frame[others]).inputs.inputs}
    columns = [
        ColSpec(known.get(name, AnyType()), name, required=not inputs[name].is_optional)
        for name in frame.columns
    ]
    outputs = infer_signature(predicted).inputs
    return ModelSignature(inputs=Schema(columns), outputs=outputs)


def cells(column: Any) -> list[Any]:
    """An Arrow column as a data frame's cells; tensors as nested lists."""
    if hasattr(column.type, "shape"):
        shape = column.type.shape
        flat = column.combine_chunks()
        flat = flat.chunk(0) if hasattr(flat, "chunk") else flat
        return list(flat.to_numpy_ndarray().reshape(-1, *shape).tolist())
    if pa.types.is_decimal(column.type):
        column = column.cast(pa.float64())
    if pa.types.is_timestamp(column.type) and column.type.tz:  # which MLflow's schemas cannot say
        column = column.cast(pa.timestamp("us"), safe=False)
    return list(column.to_pylist())


@contextlib.contextmanager
def downloaded(uri: str, tracking_uri: str) -> Iterator[Path]:
    """The files of a model that a run recorded, in a temporary folder.

    Raises UsageError, whose text follows the model's address, for any other model.
    """
    prepare_environment()
    import mlflow
    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory() as folder:
        try:
            with _global_uri(with_password(tracking_uri)):
                model = mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=folder)
        except (MlflowException, OSError) as error:
            reason = redact(str(error).partition("\n")[0])
            raise UsageError(f"is no model in {redact(tracking_uri)}: {reason}") from error
        artifacts = Path(model, "artifacts")
        if not (artifacts / WEIGHTS).exists():
            raise UsageError(f"is a model that no run of this pipeline recorded: no {WEIGHTS}")
        yield artifacts


def load_model(run_id: str, tracking_uri: str) -> Any:
    """The recorded model of a run, as `mlflow.pyfunc.load_model` gives it."""
    prepare_environment()
    import mlflow

    uri = with_password(tracking_uri)
    with _global_uri(uri):
        return mlflow.pyfunc.load_model(f"models:/{Client(uri).model_ids(run_id)[0]}")


@contextlib.contextmanager
def _global_uri(uri: str) -> Iterator[None]:
    """MLflow's own global address, by which it finds models; afterwards as before."""
    import mlflow

    variable = environment_uri()
    before = mlflow.get_tracking_uri()
    try:
        mlflow.set_tracking_uri(uri)
        yield
    finally:
        mlflow.set_tracking_uri(before)  # which sets the variable too, and the next run reads it
        os.environ["MLFLOW_TRACKING_URI"] = variable
        if not variable:
            del os.environ["MLFLOW_TRACKING_URI"]
