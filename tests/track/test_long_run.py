"""The record of a run of a million points ends soon after its last step."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

import mlflow

import pipeline
from pipeline.train import files
from tests.conftest import Command, Write

POINTS = 1_000_000
MOST_SECONDS = 60
"""With the histories read it were minutes: 34 s for each metric of 300 000 points."""


def test_what_is_left_to_do_does_not_grow_with_the_curve(job: Write, command: Command) -> None:
    result = pipeline.run(job())
    database = sqlite3.connect(result.tracking_uri.removeprefix("sqlite:///"))
    keys = [
        key for (key,) in database.execute(
            "select distinct key from metrics where run_uuid = ?", [result.run_id]
        )
    ]  # fmt: skip
    assert len(keys) >= 4
    each = POINTS // len(keys)
    with database:
        database.executemany(
            "insert into metrics (key, value, timestamp, run_uuid, step, is_nan)"
            " values (?, 1.0, ?, ?, ?, 0)",
            ((key, i, result.run_id, 10**6 + i) for key in keys for i in range(each)),
        )
    database.close()
    recorded = Path(result.storage, "recorded.json")
    known = files.read_json(recorded)
    first = known.pop("model_id")
    del known["model_uri"]
    files.write_json(recorded, known | {"complete": False})
    started = time.monotonic()
    code, out, err = command("sync", result.storage)
    assert code == 0, out + err
    assert time.monotonic() - started < MOST_SECONDS
    client = mlflow.MlflowClient(result.tracking_uri)
    model_id = files.read_json(recorded)["model_id"]
    assert model_id != first
    beside = {m.key: m.value for m in client.get_logged_model(model_id).metrics or []}
    assert beside["validation/loss"] == result.metrics["loss"]


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
