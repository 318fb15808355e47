"""A real MLflow server: `MLFLOW_TRACKING_URI` is respected, models included."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import mlflow
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import pipeline
from pipeline.rundir import RunDir
from pipeline.rundir.journal import format_line, parse_line
from pipeline.rundir.records import Launcher, Point, Record
from pipeline.tracking import process
from pipeline.tracking.client import LAUNCHER
from tests import mlflow_server
from tests.conftest import JOBS, Command


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server.running(tmp_path_factory.mktemp("server")) as found:
        yield found.uri


@pytest.fixture
def result(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pipeline.Result:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    overrides = {
        "training.epochs": 4, "storage": str(tmp_path), "tracking.experiment": "served",
        "tracking.register_as": "breast-cancer",
    }  # fmt: skip
    return pipeline.run(JOBS / "breast_cancer.yaml", overrides)


def test_the_record_and_the_model_go_to_the_server(result: pipeline.Result, server: str) -> None:
    assert result.tracking_uri == server
    client = mlflow.MlflowClient(server)
    history = client.get_metric_history(result.run_id, "train/loss")
    assert [m.value for m in history] == result.losses
    experiment = client.get_experiment_by_name("served")
    assert experiment is not None
    assert client.get_run(result.run_id).info.experiment_id == experiment.experiment_id
    (version,) = client.search_model_versions("name = 'breast-cancer'")
    assert version.run_id == result.run_id
    from pipeline.data.samples import sample

    frame = sample("sample:breast_cancer").slice(0, 3).to_pandas()
    predicted = result.model.predict(frame.drop(columns="diagnosis"))
    assert list(predicted["diagnosis"]) == list(frame["diagnosis"])


def test_a_better_model_on_the_same_rows_becomes_the_champion(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    client = mlflow.MlflowClient(server)
    base = {"storage": str(tmp_path), "tracking.register_as": "contest"}

    def trained(**changes: Any) -> str:
        return pipeline.run(JOBS / "diabetes.yaml", base | changes, fresh=True).registered

    first = trained(**{"training.epochs": 2})
    assert first == "contest version 1: candidate and champion"
    assert trained(**{"training.epochs": 20}) == "contest version 2: candidate and champion"
    worse = trained(**{"training.epochs": 1})
    assert worse.startswith("contest version 3: candidate; not champion: r2 ")
    other = trained(**{"training.epochs": 20, "data.split_seed": 9})
    assert other.endswith("not champion: version 2 was judged on other validation rows")
    judged = trained(**{"training.epochs": 1, "metrics": ["rmse"]})
    assert judged.endswith("not champion: version 2 was not judged by rmse")
    assert client.get_model_version_by_alias("contest", "champion").version == "2"
    assert client.get_model_version_by_alias("contest", "candidate").version == "5"
    late = RunDir(tmp_path / "diabetes-3")  # whose record was cut off, and is completed now
    facts = {"complete": False, "model_uri": ""}
    late.read_recorded().model_copy(update=facts).write(late.recorded)
    assert command("sync", late.path)[0] == 0
    assert late.read_recorded().registered.startswith("contest version 3: an earlier candidate")
    assert client.get_model_version_by_alias("contest", "candidate").version == "5"
    version = client.get_model_version("contest", "1")
    (model,) = client.get_run(version.run_id).outputs.model_outputs
    card = client.get_logged_model(model.model_id).tags["mlflow.note.content"]
    assert card == version.description
    assert "| bmi | double |" in card
    assert "| r2 | " in card


def test_a_run_is_not_created_twice_when_the_answer_was_lost(
    result: pipeline.Result, server: str
) -> None:
    run = RunDir(Path(result.storage))
    client = mlflow.MlflowClient(server)
    experiment = client.get_run(result.run_id).info.experiment_id
    run.recorded.unlink()
    record = Record.read(run.record)
    record.params["checkpoint.keep"] = "7"  # as another machine may have it
    record.write(run.record)
    assert process.finish(run.path).run_id == result.run_id
    runs = client.search_runs([experiment])
    places = [run.data.tags["pipeline.storage"] for run in runs]
    assert places.count(str(run.path)) == 1
    history = client.get_metric_history(result.run_id, "train/loss")
    assert [m.value for m in history] == result.losses, "what was sent again is there once"


def test_points_of_another_machine_are_not_sent_again(
    result: pipeline.Result, server: str, tmp_path: Path
) -> None:
    """It resumed the run for a while, from its backup; the steps have other times there."""
    run = RunDir(shutil.copytree(result.storage, tmp_path / "back"))
    client = mlflow.MlflowClient(server)
    client.set_tag(result.run_id, LAUNCHER, "another command")
    launcher = Launcher(id="this command", pid=os.getpid(), host="here")
    Record.read(run.record).model_copy(update={"launcher": launcher}).write(run.record)
    nothing = {"uploaded": {}, "complete": False}
    run.read_recorded().model_copy(update=nothing).write(run.recorded)
    points = [parse_line(line) for line in run.journal.open("rb")]
    lines = [format_line(cast(Point, {**point, "time": point["time"] + 1})) for point in points]
    run.journal.write_bytes(b"".join(lines))
    assert process.finish(run.path).run_id == result.run_id
    history = client.get_metric_history(result.run_id, "train/loss")
    assert [m.value for m in history] == result.losses
    assert client.get_run(result.run_id).info.status == "FINISHED"


def test_params_too_long_for_mlflow_are_complete_in_the_spec(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """500 columns, some with names that MLflow refuses as keys."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    odd = "🙂=\n"
    names = [f"{'measurement' * 3} {n} {odd[n % 3]}../{{}}" for n in range(500)]
    generator = np.random.default_rng(0)
    columns = {name: generator.normal(size=40) for name in names}
    pq.write_table(pa.table({**columns, "y": generator.normal(size=40)}), tmp_path / "rows.parquet")
    spec: dict[str, Any] = {
        "name": "wide", "model": "linear", "loss": "mse", "storage": str(tmp_path),
        "data": {"train": str(tmp_path / "rows.parquet"), "inputs": names, "target": "y",
                 "missing": dict.fromkeys(names[:40], "mean")},
        "training": {"epochs": 2},
    }  # fmt: skip
    result = pipeline.run(spec)
    client = mlflow.MlflowClient(server)
    run = client.get_run(result.run_id)
    assert run.info.status == "FINISHED"
    assert len(run.data.params["data.inputs"]) == 6000, "cut"
    path = client.download_artifacts(result.run_id, "spec.yaml")
    recorded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    assert recorded["data"]["inputs"] == names
    assert len(result.model.predict(pd.DataFrame({name: [0.5] for name in names}))) == 1
