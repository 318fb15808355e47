"""Every job in `jobs/` trains to what it promises, read back from MLflow by its own client."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pyarrow as pa
import pytest

import pipeline
from pipeline.tracking.model import cells
from tests.conftest import JOBS

IMPORTS = {"custom_loss": [str(JOBS / "custom_loss.py")]}
PROMISED = {
    "digits": ("validation/accuracy", 0.97),
    "breast_cancer": ("validation/accuracy", 0.95),
    "breast_cancer_probabilities": ("validation/accuracy", 0.95),
    "caravan": ("validation/average_precision", 0.14),
    "diabetes": ("validation/r2", 0.4),
    "flchain": ("validation/concordance", 0.78),
    "flights": ("validation/r2", 0.8),
}
ALL_JOBS = sorted(path.stem for path in JOBS.glob("*.yaml"))
VALIDATED = [name for name in ALL_JOBS if name != "linear"]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


Trained = Callable[[str], pipeline.Result]


@pytest.fixture(scope="module")
def trained(storage: Path) -> Trained:
    """The job's run, trained once for all tests."""

    @cache
    def train(name: str) -> pipeline.Result:
        overrides = {"storage": str(storage)}
        return pipeline.run(JOBS / f"{name}.yaml", overrides, IMPORTS.get(name, []))

    return train


every_job = pytest.mark.parametrize("name", ALL_JOBS)


def run_of(result: pipeline.Result) -> tuple[mlflow.MlflowClient, Any]:
    client = mlflow.MlflowClient(result.tracking_uri)
    return client, client.get_run(result.run_id)


@pytest.mark.jobs
@every_job
def test_mlflow_holds_every_step_of_the_curve_once(trained: Trained, name: str) -> None:
    result = trained(name)
    client, run = run_of(result)
    history = client.get_metric_history(result.run_id, "train/loss")
    assert [m.step for m in history] == list(range(1, result.steps + 1))
    assert [m.value for m in history] == result.losses
    assert run.info.status == "FINISHED"
    norms = client.get_metric_history(result.run_id, "train/gradient_norm")
    assert [m.step for m in norms] == list(range(1, result.steps + 1))
    rates = client.get_metric_history(result.run_id, "train/learning_rate")
    last = result.best["step"] if result.best else result.steps
    assert len({m.value for m in rates}) > 1 or rates[-1].step >= last
    assert (
        client.get_metric_history(result.run_id, "system/throughput/rows_per_second")[-1].value > 0
    )
    inputs = {one.tags[0].value: one.dataset for one in run.inputs.dataset_inputs}
    assert set(inputs) <= {"training", "validation", "test"}
    assert len({one.digest for one in inputs.values()}) == len(inputs)
    for dataset in inputs.values():
        assert json.loads(dataset.profile)["num_rows"] > 0
        columns = json.loads(dataset.schema)["mlflow_colspec"]
        assert {"name", "type", "required"} == set(columns[0])
    model = client.get_logged_model(run.outputs.model_outputs[0].model_id)
    assert not any(m.key.startswith("system/") for m in model.metrics)
    of_rows = {m.key: m.dataset_digest for m in model.metrics}
    assert of_rows["train/loss"] == inputs["training"].digest
    if "validation" in inputs:
        assert of_rows["validation/loss"] == inputs["validation"].digest


@pytest.mark.jobs
@pytest.mark.parametrize("name", VALIDATED)
def test_the_validation_loss_ends_better_than_it_began(trained: Trained, name: str) -> None:
    result = trained(name)
    client, _ = run_of(result)
    losses = [m.value for m in client.get_metric_history(result.run_id, "validation/loss")]
    assert losses[-1] < losses[0]


@pytest.mark.jobs
@pytest.mark.parametrize("name", PROMISED)
def test_the_promised_quality_is_reached(trained: Trained, name: str) -> None:
    _, run = run_of(trained(name))
    metric, least = PROMISED[name]
    assert run.data.metrics[metric] >= least


@pytest.mark.jobs
@every_job
def test_params_tags_and_spec_tell_what_was_run(
    trained: Trained, name: str, tmp_path: Path
) -> None:
    result = trained(name)
    _, run = run_of(result)
    spec_path, environment_path = (
        mlflow.artifacts.download_artifacts(
            run_id=result.run_id, artifact_path=artifact, dst_path=str(tmp_path),
            tracking_uri=result.tracking_uri,
        )
        for artifact in ("spec.yaml", "environment.json")
    )  # fmt: skip
    spec = pipeline.load(spec_path)
    assert spec.name == name
    assert run.data.tags["pipeline.spec_digest"] == spec.digest
    assert len(run.data.tags["pipeline.data_fingerprint"]) == 64
    environment = json.loads(Path(environment_path).read_text())
    assert {"torch", "python"} <= set(environment["versions"])
    assert [part["after_step"] for part in environment["bits"]] == [0]
    assert run.data.params["optimizer.name"] == spec.optimizer.name
    assert run.data.params["training.batch_size"] == str(spec.training.batch_size)


@pytest.mark.jobs
def test_each_weighted_term_has_a_curve_and_they_add_up(trained: Trained) -> None:
    result = trained("multi_term")
    client, _ = run_of(result)
    spec = pipeline.load(Path(result.storage) / "spec.yaml")
    curves = [
        [m.value for m in client.get_metric_history(result.run_id, f"train/loss/{label}")]
        for label in spec.labels
    ]
    weights = [term.weight for term in spec.loss]
    sums = [sum(w * v for w, v in zip(weights, step, strict=True))
            for step in zip(*curves, strict=True)]  # fmt: skip
    assert sums == pytest.approx(result.losses, rel=1e-12)


@pytest.mark.jobs
@every_job
def test_the_model_takes_raw_columns_and_gives_target_columns(trained: Trained, name: str) -> None:
    result = trained(name)
    record = json.loads((Path(result.storage) / "record.json").read_text())
    table = pa.ipc.open_file(base64.b64decode(record["example"])).read_all()
    frame = pd.DataFrame({name: cells(table[name]) for name in table.column_names})
    predicted = result.model.predict(frame)
    spec = pipeline.load(Path(result.storage) / "spec.yaml")
    assert len(predicted) == len(frame)
    if spec.loss[0].name != "cox":  # which orders rows, and tells no time
        assert set(spec.data.targets) <= set(predicted.columns)
    signature = result.model.metadata.signature
    assert signature.inputs.input_names() == table.column_names
    one_row = result.model.predict(frame.iloc[:1])
    assert list(one_row.columns) == list(predicted.columns)


@pytest.mark.jobs
@every_job
def test_the_model_holds_no_pickled_code(trained: Trained, name: str) -> None:
    result = trained(name)
    record = json.loads((Path(result.storage) / "recorded.json").read_text())
    mlflow.set_tracking_uri(result.tracking_uri)
    folder = Path(mlflow.artifacts.download_artifacts(record["model_uri"]))
    assert not list(folder.rglob("*.pkl"))
    assert (folder / "artifacts" / "weights.pt").exists()


@pytest.mark.jobs
def test_the_served_accuracy_is_the_recorded_one(storage: Path) -> None:
    result = pipeline.run(JOBS / "digits.yaml", {"storage": str(storage), "training.epochs": 2})
    from pipeline.data import locate, reader, split

    spec = pipeline.load(JOBS / "digits.yaml")
    train = reader.open_sources(locate.locate(spec.data, JOBS))["train"]
    (block,) = train.blocks()
    splits = split.Splitter(spec.data, train, {}).split(train, block)
    validation = next(rows.table for rows in splits if rows.split == "validation")
    frame = pd.DataFrame({"image": cells(validation["image"])})
    right = result.model.predict(frame)["digit"].to_numpy() == validation["digit"].to_numpy()
    assert right.mean() == pytest.approx(result.metrics["accuracy"], abs=1e-9)
