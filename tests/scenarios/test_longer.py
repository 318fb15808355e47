"""A finished run that goes on for more epochs: the curve of one that was as long from the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest

import pipeline
from tests.conftest import merged


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 80))
    pd.DataFrame({"a": a, "b": b, "y": np.tanh(a - b)}).to_parquet(tmp_path / "rows.parquet")
    return {
        "name": "longer", "loss": "mse", "model": {"name": "mlp", "hidden": [8], "dropout": 0.1},
        "data": {"train": str(tmp_path / "rows.parquet"), "target": "y", "validation": 0.2,
                 "test": 0.1},
        "schedule": {"name": "step", "every_steps": 7}, "checkpoint": {"every_steps": 4},
        "training": {"epochs": 3, "batch_size": 10, "microbatch_size": 5, "best_by": "rmse",
                     "average": {"ema": 0.8}, "stop": {"patience": 50}},
        "storage": str(tmp_path / "runs"),
    }  # fmt: skip


def said_by(lines: list[str], start: str) -> list[str]:
    return [line for line in lines if line.startswith(start)]


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.chaos)])
def test_it_has_the_bits_of_a_long_run_and_is_a_run_below_the_short_one(
    workers: int, tree: dict[str, Any], tmp_path: Path
) -> None:
    long = {"training.epochs": 6, "workers.num": workers}
    fresh = pipeline.run(tree, {**long, "storage": str(tmp_path / "other")})
    short = pipeline.run(tree)
    said: list[str] = []
    result = pipeline.run(tree, long, say=said.append)
    assert said_by(said, "note  longer-2 goes on from step"), said
    assert result.curve_sha256 == fresh.curve_sha256
    assert result.weights_sha256 == fresh.weights_sha256
    assert (result.metrics, result.test, result.best) == (fresh.metrics, fresh.test, fresh.best)
    client = mlflow.MlflowClient(result.tracking_uri)
    tags = client.get_run(result.run_id).data.tags
    assert tags["mlflow.parentRunId"] == short.run_id
    assert tags["pipeline.goes_on_from"].endswith("of longer-1")
    history = client.get_metric_history(result.run_id, "train/loss")
    assert [one.step for one in history] == list(range(1, result.steps + 1))
    assert pipeline.run(tree, long).run_id == result.run_id, "it is finished already"
    assert client.get_run(short.run_id).info.status == "FINISHED"


def test_in_an_object_store_too(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    fresh = pipeline.run(tree, {"training.epochs": 6})
    elsewhere = {"storage": f"file://{tmp_path / 'store'}"}
    pipeline.run(tree, elsewhere)
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path / "another machine"))
    said: list[str] = []
    result = pipeline.run(tree, {**elsewhere, "training.epochs": 6}, say=said.append)
    assert said_by(said, "note  longer-2 goes on from step"), said
    assert result.curve_sha256 == fresh.curve_sha256
    assert result.weights_sha256 == fresh.weights_sha256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": {"name": "cosine"}}, "its schedule cosine depends on how long training"),
        pytest.param(
            {"training.average": {"swa": {}}},
            "its average begins at a share of all steps",
            marks=pytest.mark.chaos,
        ),
        pytest.param(
            {"training.evaluate_every": {"steps": 5}},
            "its end is no time to evaluate",
            marks=pytest.mark.chaos,
        ),
        pytest.param(
            {"checkpoint": {}, "data.test": None},
            "its checkpoints are not here",
            marks=pytest.mark.chaos,
        ),
        ({"training.stop": {"patience": 1, "min_delta": 9.0}}, "it ended early, at step"),
    ],
)
def test_a_run_whose_first_steps_would_be_others_starts_anew(
    changes: dict[str, Any], message: str, tree: dict[str, Any], tmp_path: Path
) -> None:
    tree = {**tree, **{key: value for key, value in changes.items() if "." not in key}}
    tree = merged(tree, {key: value for key, value in changes.items() if "." in key})
    pipeline.run(tree)
    said: list[str] = []
    result = pipeline.run(tree, {"training.epochs": 4}, say=said.append)
    assert any(message in line for line in said), said
    fresh = pipeline.run(tree, {"training.epochs": 4, "storage": str(tmp_path / "other")})
    assert result.curve_sha256 == fresh.curve_sha256
    tags = mlflow.MlflowClient(result.tracking_uri).get_run(result.run_id).data.tags
    assert "mlflow.parentRunId" not in tags


def test_other_changes_start_anew_without_a_word_of_length(tree: dict[str, Any]) -> None:
    pipeline.run(tree)
    said: list[str] = []
    pipeline.run(tree, {"training.epochs": 4, "optimizer": {"name": "sgd"}}, say=said.append)
    assert not said_by(said, "note  longer"), said
