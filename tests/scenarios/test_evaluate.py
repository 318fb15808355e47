"""`pipeline evaluate`: on a run's test rows what the run says itself; recorded with the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk

import pipeline
from pipeline.errors import InputError
from pipeline.launch.evaluate import evaluate
from pipeline.launch.result import Result
from pipeline.rundir import RunDir
from tests.conftest import Command

MEDIANS = ("mae", "median_absolute_error")
"""Metrics whose constant prediction is a median, which only the training rows have."""


def rows(num: int, seed: int) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    size, age = rng.normal(100, 20, num), rng.normal(size=num)
    age[::7] = np.nan  # rows that are dropped
    return pd.DataFrame({
        "size": size, "age": age, "city": rng.choice(["bern", "chur"], num),
        "price": 3 * size + rng.normal(size=num), "w": rng.random(num),
        "sold": np.where(size + rng.normal(0, 20, num) > 100, "yes", "no"),
    })  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run with two targets, weights, dropped rows, and a loss whose denominator is tried."""
    folder = tmp_path_factory.mktemp("evaluated")
    for index, name in enumerate(("train", "validation", "test")):
        rows(300, index).to_parquet(folder / f"{name}.parquet")
    return pipeline.run({
        "name": "homes",
        "data": {**{name: str(folder / f"{name}.parquet")
                    for name in ("train", "validation", "test")},
                 "inputs": ["size", "age", "city"], "target": ["price", "sold"],
                 "missing": {"age": "drop"}, "target_scale": {"price": "standard"},
                 "sample_weight": {"column": "w", "in_metrics": True}},
        "model": {"name": "mlp", "hidden": [8]},
        "loss": [{"name": "mse", "target": "price"},
                 {"name": "bce_with_logits", "target": "sold"}],
        "training": {"epochs": 3, "batch_size": 32, "best_by": "loss"},
        "storage": str(folder / "runs"),
    })  # fmt: skip


def test_of_its_test_rows_it_says_what_the_run_says(trained: Result) -> None:
    folder = Path(trained.storage).parent.parent
    found = evaluate(trained.storage, [str(folder / "test.parquet")], record=False)
    assert found.metrics == trained.test
    assert found.baselines == {k: v for k, v in trained.test_baselines.items() if k not in MEDIANS}
    record = RunDir(Path(trained.storage)).read_record()
    assert record is not None
    assert found.digest == record.data.digests["test"]
    assert (found.num_rows, found.num_dropped) == (257, 43)


def test_metrics_are_scikit_learns_on_the_served_predictions(
    trained: Result, tmp_path: Path
) -> None:
    frame = rows(200, 9)
    for index, part in enumerate((frame[:120], frame[120:])):
        part.to_parquet(tmp_path / f"{index}.parquet")
    found = evaluate(trained.storage, [str(tmp_path)], record=False).metrics
    kept = frame.dropna()
    predicted = trained.model.predict(kept[["size", "age", "city"]])
    wanted = sk.root_mean_squared_error(kept["price"], predicted["price"], sample_weight=kept["w"])
    assert found["rmse"] == pytest.approx(wanted, rel=1e-5)
    scores = predicted["sold_probability_yes"]
    wanted = sk.roc_auc_score(kept["sold"] == "yes", scores, sample_weight=kept["w"])
    assert found["roc_auc"] == pytest.approx(wanted, rel=1e-6)


def test_mlflow_has_it_with_the_model_and_the_rows(
    trained: Result, tmp_path: Path, command: Command
) -> None:
    rows(80, 5).to_parquet(tmp_path / "new.parquet")
    page = tmp_path / "page.html"
    code, out, err = command(
        "evaluate", trained.storage, tmp_path / "new.parquet", "--json", "--report", page
    )
    assert code == 0, err
    said = json.loads(out)
    assert "test rmse" in err
    client = mlflow.MlflowClient(trained.tracking_uri)
    run = client.get_run(said["run_id"])
    assert run.data.tags["mlflow.parentRunId"] == trained.run_id
    assert run.data.metrics["test/rmse"] == said["metrics"]["rmse"]
    assert {one.path for one in client.list_artifacts(run.info.run_id)} >= {"report.html"}
    (model,) = client.search_logged_models([run.info.experiment_id])
    digests = {
        one.dataset_digest: one.value for one in model.metrics or () if one.key == "test/rmse"
    }
    assert digests[said["digest"][:36]] == said["metrics"]["rmse"]
    assert len(digests) == 2  # beside the run's own
    assert "data:image/png" in page.read_text()


def test_a_recorded_model_is_evaluated_by_its_address(trained: Result) -> None:
    folder = Path(trained.storage).parent
    files = [str(folder.parent / "test.parquet")]
    found = evaluate(trained.model_uri, files, storage=folder)
    assert found.metrics == trained.test
    parent = mlflow.MlflowClient(found.tracking_uri).get_run(found.run_id).data.tags
    assert parent["mlflow.parentRunId"] == trained.run_id


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"price": None}, "data.target: no column 'price' in .*new.parquet"),
        ({"w": None}, "data.sample_weight: no column 'w'"),
        (
            {"price": np.nan},
            r"data\.target: column 'price' of .*new.parquet has missing values.*row 1",
        ),
        ({"sold": "perhaps"}, "column 'sold' .*perhaps"),
        ({"age": np.nan}, "FILES: no rows in "),
    ],
)
def test_rows_that_cannot_be_judged_are_refused(
    change: dict[str, Any], message: str, trained: Result, tmp_path: Path
) -> None:
    frame = rows(20, 6).assign(**change)
    frame = frame.drop(columns=[name for name, value in change.items() if value is None])
    frame.to_parquet(tmp_path / "new.parquet")
    with pytest.raises(InputError, match=message):
        evaluate(trained.storage, [str(tmp_path / "new.parquet")], record=False)
