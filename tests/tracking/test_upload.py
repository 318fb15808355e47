"""What a run's tags say of its attempts, and what its errors do not say."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pytest

import pipeline
from pipeline.redact import redact
from pipeline.rundir import RunDir
from pipeline.rundir.records import Start
from pipeline.tracking.upload import _bits, _tags
from tests.conftest import Command, Write


def start(step: int, workers: int, order: str) -> Start:
    bits = {"order": order}
    return {
        "event": "start",
        "step": step,
        "attempt": 1,
        "workers": workers,
        "reached": 0,
        "bits": bits,
    }


def test_tags_say_from_which_step_bits_depend_on_what() -> None:
    assert _tags([]) == {}
    same = [start(0, 2, "micro-batches of 4"), start(30, 3, "micro-batches of 4")]
    assert _tags(same) == {"pipeline.workers": "2, 3"}
    starts = [start(0, 1, "1 workers"), start(50, 2, "2 workers"), start(70, 2, "2 workers")]
    tags = _tags(starts)
    assert tags["pipeline.workers"] == "1, 2, 2"
    assert _bits(starts) == [
        {"after_step": 0, "bits": {"order": "1 workers"}},
        {"after_step": 50, "bits": {"order": "2 workers"}},
    ]
    assert len(tags["pipeline.bits_sha256"]) == 64


def test_of_an_address_only_secrets_are_hidden_elsewhere() -> None:
    uri = "postgresql://mlflow:se%20cret@mlflow-db/x?sslmode=require&api_token=T0KEN-99"
    told = "mlflow-db not found, SSL required: GET /x?api_token=T0KEN-99 (se cret, se%20cret)"
    assert redact(told, uri) == (
        "mlflow-db not found, SSL required: GET /x?api_token=*** (***, ***)"
    )
    assert redact(f"cannot use {uri}", uri) == (
        "cannot use postgresql://***@mlflow-db/x?sslmode=***&api_token=***"
    )


def test_every_change_of_the_learning_rate_reaches_mlflow(job: Write) -> None:
    """Also where a batch of metrics ends: MLflow takes a thousand of them at once."""
    result = pipeline.run(job({"training.epochs": 250, "schedule": "cosine"}))
    rates = [point["train"]["learning_rate"] for point in result.curve if "train" in point]
    assert len(rates) > 700
    client = mlflow.MlflowClient(result.tracking_uri)
    history = client.get_metric_history(result.run_id, "train/learning_rate")
    assert [metric.value for metric in history] == rates


def test_what_was_not_sent_after_the_model_is_sent_by_the_next_try(
    job: Write, command: Command
) -> None:
    """The upload is cut off between the model and the best evaluation's metrics."""
    path = job({"training.best_by": "loss"})
    result = pipeline.run(path)
    client = mlflow.MlflowClient(result.tracking_uri)
    run = RunDir(Path(result.storage))
    other = client.create_run(client.get_run(result.run_id).info.experiment_id)
    cut = {"complete": False, "run_id": other.info.run_id}
    run.read_recorded().model_copy(update=cut).write(run.recorded)
    assert command("sync", result.storage)[0] == 0
    metrics = client.get_run(other.info.run_id).data.metrics
    assert metrics["best/loss"] == pytest.approx(result.best["value"] if result.best else None)
