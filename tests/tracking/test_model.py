"""A record that is finished by another try, and one of many points."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path

import mlflow
import pytest
import sqlalchemy

import pipeline
from pipeline.launch.result import Result
from pipeline.report.drawing import Drawing
from pipeline.rundir import RunDir
from pipeline.rundir.records import Ended
from pipeline.tracking.upload import Upload
from tests.conftest import Command, Write

NUM_POINTS = 300_000


def unfinished(result: Result, *without: str) -> None:
    """The record as it is when the process that writes it dies while the model is logged."""
    run = RunDir(Path(result.storage))
    facts = {"complete": False} | dict.fromkeys(without, "")
    run.read_recorded().model_copy(update=facts).write(run.recorded)


@pytest.mark.parametrize("without", [["model_uri"], ["model_uri", "model_id"]], ids=str)
def test_another_try_continues_with_the_same_model(
    without: list[str], job: Write, command: Command
) -> None:
    result = pipeline.run(job())
    unfinished(result, *without)
    assert command("sync", result.storage)[0] == 0
    client = mlflow.MlflowClient(result.tracking_uri)
    run = client.get_run(result.run_id)
    models = client.search_logged_models([run.info.experiment_id])
    assert [str(model.status) for model in models] == ["READY"]
    assert [output.model_id for output in run.outputs.model_outputs] == [models[0].model_id]


def test_a_long_record_is_not_read_again_when_the_model_is_logged(
    job: Write,
) -> None:
    result = pipeline.run(job())
    unfinished(result, "model_uri", "model_id")
    with sqlite3.connect(result.tracking_uri.removeprefix("sqlite:///")) as database:
        database.executemany(
            "INSERT INTO metrics (key, value, timestamp, run_uuid, step, is_nan) "
            "VALUES (?, ?, ?, ?, ?, 0)",
            (
                (f"train/{number % 4}", 0.5, number, result.run_id, number // 4 + 1)
                for number in range(NUM_POINTS)
            ),
        )
        database.executemany(
            "INSERT OR REPLACE INTO latest_metrics (key, value, timestamp, run_uuid, step, is_nan) "
            "VALUES (?, 0.5, ?, ?, ?, 0)",
            ((f"train/{key}", NUM_POINTS, result.run_id, NUM_POINTS // 4) for key in range(4)),
        )
    statements: list[str] = []

    def note(connection: object, cursor: object, statement: str, *_: object) -> None:
        statements.append(statement)

    sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", note)
    upload = Upload(RunDir(Path(result.storage)), Drawing())
    try:
        upload.read()
        upload.begin()
        upload.finish(Ended(state="finished"))
    finally:
        sqlalchemy.event.remove(sqlalchemy.Engine, "before_cursor_execute", note)
    of_metrics = [one for one in statements if re.search(r"\bmetrics\b", one)]
    read = [one for one in of_metrics if one.startswith("SELECT")]
    assert of_metrics
    assert all("metrics.timestamp = ?" in one for one in read), read  # single points only
