"""Rows for a test: looked at once, with the weights that become the model, and recorded so."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk

import pipeline
from pipeline.rundir import RunDir
from pipeline.rundir.records import Done, Scores
from pipeline.spec import load
from pipeline.train import loop
from pipeline.train.job import Job, prepare
from pipeline.train.loop import train
from tests.processes import on_workers

NUM_ROWS = {"train": 90, "validation": 31, "test": 37}


def spec_of(folder: Path, **data: Any) -> dict[str, Any]:
    """A job of which each split has files of its own, with other means."""
    rng = np.random.default_rng(3)
    for shift, (split, num) in enumerate(NUM_ROWS.items()):
        a, b = rng.normal(shift, 1 + shift, size=(2, num))
        slope = -1 if split == "validation" else 2  # so that the best weights are early ones
        frame = pd.DataFrame({"a": a, "b": b, "w": rng.random(num), "y": slope * a - b + 5})
        frame.to_parquet(folder / f"{split}.parquet")
    files = {split: str(folder / f"{split}.parquet") for split in NUM_ROWS}
    return {
        "name": "tested", "loss": "mse", "model": {"name": "mlp", "hidden": [8]},
        "data": {**files, "inputs": ["a", "b"], "target": "y"} | data,
        "optimizer": {"name": "adamw", "lr": 0.3},
        "training": {"epochs": 8, "batch_size": 16, "microbatch_size": 3, "best_by": "rmse"},
    }  # fmt: skip


def trained(spec: dict[str, Any], folder: Path, run: str) -> list[int]:
    """Train in this process, or with its part among several; the steps that it took."""
    (folder / run).mkdir(exist_ok=True)
    steps: list[int] = []
    train(prepare(load(spec), folder), RunDir(folder / run), steps.append)
    return steps


def scores(run: Path) -> Scores:
    """What the test gave."""
    test = Done.read(run / "done.json").test
    assert test is not None
    return test


@pytest.mark.parametrize("weight", [None, "w"])
def test_the_scores_are_those_of_the_served_model(weight: str | None, tmp_path: Path) -> None:
    weighted = {"sample_weight": {"column": weight, "in_metrics": True}} if weight else {}
    result = pipeline.run(spec_of(tmp_path, **weighted), {"storage": str(tmp_path / "runs")})
    assert result.best is not None
    assert result.best["step"] < result.steps  # other weights than the last
    frame = pd.read_parquet(tmp_path / "test.parquet")
    predicted = result.model.predict(frame[["a", "b"]])["y"]
    by = frame[weight] if weight else None
    wanted = sk.root_mean_squared_error(frame["y"], predicted, sample_weight=by)
    assert result.test["rmse"] == pytest.approx(wanted, rel=1e-5)
    constant = pd.read_parquet(tmp_path / "train.parquet")["y"].mean()
    rmse = sk.root_mean_squared_error(frame["y"], [constant] * len(frame), sample_weight=by)
    assert result.test_baselines["rmse"] == pytest.approx(rmse, rel=1e-5)
    assert result.summary()["test"] == result.test


def test_mlflow_has_them_with_the_rows_and_the_model_that_they_are_of(tmp_path: Path) -> None:
    result = pipeline.run(spec_of(tmp_path), {"storage": str(tmp_path / "runs")})
    client = mlflow.MlflowClient(result.tracking_uri)
    run = client.get_run(result.run_id)
    (value,) = client.get_metric_history(result.run_id, "test/rmse")
    assert result.best is not None
    assert (value.value, value.step) == (result.test["rmse"], result.best["step"])
    contexts = {one.tags[0].value: one.dataset for one in run.inputs.dataset_inputs}
    assert json.loads(contexts["test"].profile)["num_rows"] == NUM_ROWS["test"]
    assert contexts["test"].digest != contexts["validation"].digest
    (model,) = client.search_logged_models([run.info.experiment_id])
    (of_model,) = [one for one in model.metrics or () if one.key == "test/rmse"]
    assert of_model.dataset_digest == contexts["test"].digest
    assert "| test | " in run.data.tags["mlflow.note.content"]


def test_nothing_of_the_training_knows_them(tmp_path: Path) -> None:
    trained(spec_of(tmp_path), tmp_path, "with")
    trained(spec_of(tmp_path, test=None), tmp_path, "without")
    one, other = (Done.read(tmp_path / name / "done.json") for name in ("with", "without"))
    assert one.weights_sha256 == other.weights_sha256
    assert one.best == other.best
    assert other.test is None
    assert one.test is not None
    assert one.test.metrics.keys() == one.test.baselines.keys() | {"loss"}


def one_of(spec: dict[str, Any], folder: Path, rank: int, num: int) -> None:
    """What one of `num` workers does."""
    trained(spec, folder, f"on-{num}")


@pytest.mark.parametrize("how", ["files", "fractions", "streamed"])
def test_they_are_the_same_on_any_number_of_workers(how: str, tmp_path: Path) -> None:
    drawn: dict[str, Any] = {} if how == "files" else {"validation": 0.2, "test": 0.3}
    if how == "streamed":
        drawn |= {"stream": {"block_rows": 16, "window": 2}}
    work = partial(one_of, spec_of(tmp_path, **drawn), tmp_path)
    work(0, 1)
    alone = scores(tmp_path / "on-1")
    assert len(alone.metrics) > 3
    for num in (3, 5):
        on_workers(num, work)
        assert scores(tmp_path / f"on-{num}") == alone


def test_a_run_that_ended_before_them_looks_at_them_again(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    trained(spec, tmp_path, "run")
    run = RunDir(tmp_path / "run")
    wanted = scores(run.path)
    run.done.unlink()
    run.weights.unlink()
    trained(spec, tmp_path, "run")
    assert scores(run.path) == wanted


def test_an_error_in_them_costs_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate_rows = loop._evaluate_rows

    def failing(job: Job, state: Any, rows: Any, *about: Any, **more: Any) -> Any:
        if rows is job.test:
            raise ValueError("a damaged row")
        return evaluate_rows(job, state, rows, *about, **more)

    spec = spec_of(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_evaluate_rows", failing)
        with pytest.raises(ValueError, match="a damaged row") as caught:
            trained(spec, tmp_path, "run")
    assert caught.value.__notes__ == ["in the evaluation of the test rows"]
    assert trained(spec, tmp_path, "run") == []
    trained(spec, tmp_path, "undisturbed")
    assert scores(tmp_path / "run") == scores(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"validation": 0.5, "test": 0.5}, "together take 1 of the rows"),
        (
            {"test": {"fraction": 0.1, "group": "a", "time": "b"}},
            "data.test: give one of group and",
        ),
        ({"test": {"fraction": 0.1, "tme": "a"}}, "data.test: tme: unknown key; did you mean"),
        ({"test": 1.5}, "data.test: expected files, or a fraction"),
        ({"test": "train.parquet"}, "data.test: .*train.parquet is named a second time"),
        ({"test": "none.parquet"}, "data.test: "),
        (
            {"train": "sample:digits", "test": "sample:digits"},
            "data.test: sample:digits is named a second time, data.train has it already",
        ),
        ({"test": {"since": "soon", "time": "a"}}, "data.test.since: 'soon' is not a double"),
        ({"test": {"since": 1e9, "time": "a"}}, "data.test: .* leaves 0 for test and 90"),
    ],
)
def test_faults_name_the_key(data: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(pipeline.errors.InputError, match=message):
        prepare(load(spec_of(tmp_path, **data)), tmp_path)
