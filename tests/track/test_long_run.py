"""A record that is finished by another try."""

from __future__ import annotations

from pathlib import Path

import mlflow

import pipeline
from pipeline.train import files
from tests.conftest import Command, Write


def test_another_try_goes_on_with_the_same_model(job: Write, command: Command) -> None:
    result = pipeline.run(job())
    recorded = Path(result.storage, "recorded.json")
    known = files.read_json(recorded)
    del known["model_uri"]
    files.write_json(recorded, known | {"complete": False})
    assert command("sync", result.storage)[0] == 0
    client = mlflow.MlflowClient(result.tracking_uri)
    models = client.search_logged_models([client.get_run(result.run_id).info.experiment_id])
    assert [str(model.status) for model in models] == ["READY"]
