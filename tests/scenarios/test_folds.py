"""Cross-validation: a run above one for each fold, against scikit-learn on the same folds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score

import pipeline
from pipeline.data import locate, reader, split
from pipeline.errors import DataError, UsageError
from pipeline.spec import load
from tests.conftest import Command, merged

FOLDS = 3


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 200))
    kind = rng.choice(["rare", "usual"], 200, p=[0.1, 0.9])
    frame = pd.DataFrame({"a": a, "b": b, "kind": kind, "y": a - 2 * b + rng.normal(size=200)})
    frame.to_parquet(tmp_path / "rows.parquet")
    return {
        "name": "cross", "loss": "mse", "model": "linear", "optimizer": {"name": "sgd", "lr": 0.1},
        "data": {"train": str(tmp_path / "rows.parquet"), "inputs": ["a", "b"], "target": "y",
                 "validation": {"fraction": 0.2, "stratify": "kind"}, "test": 0.2},
        "training": {"epochs": 60, "batch_size": 200}, "storage": str(tmp_path / "runs"),
    }  # fmt: skip


def rows_of(tree: dict[str, Any], fold: int) -> dict[str, pd.DataFrame]:
    """The rows of each split, as a fold's run has them."""
    validation = {"stratify": "kind", "folds": FOLDS, "fold": fold}
    data = load(merged(tree, {"data.validation": validation})).data
    source = reader.open_sources(locate.locate(data, Path()))["train"]
    splitter = split.Splitter(data, source, {})
    parts = [part for block in source.blocks() for part in splitter.split(source, block)]
    return {part.split: part.table.to_pandas() for part in parts}


def test_each_fold_is_a_run_below_one_with_means_and_deviations(tree: dict[str, Any]) -> None:
    found = pipeline.run_folds(tree, FOLDS)
    wanted = []
    for fold in range(1, FOLDS + 1):
        rows = rows_of(tree, fold)
        own = LinearRegression().fit(rows["train"][["a", "b"]], rows["train"]["y"])
        held = rows["validation"]
        wanted.append(r2_score(held["y"], own.predict(held[["a", "b"]])))
    assert found.scores["validation/r2"] == pytest.approx(wanted, abs=1e-3)
    assert found.means["validation/r2"] == pytest.approx(np.mean(wanted), abs=1e-3)
    assert found.deviations["validation/r2"] == pytest.approx(np.std(wanted, ddof=1), abs=1e-3)
    client = mlflow.MlflowClient(found.tracking_uri)
    above = client.get_run(found.run_id)
    assert above.data.metrics["validation/r2"] == found.means["validation/r2"]
    assert above.data.metrics["validation/r2/deviation"] == found.deviations["validation/r2"]
    history = client.get_metric_history(found.run_id, "fold/validation/r2")
    assert [(one.step, one.value) for one in history] == [
        (fold, value) for fold, value in enumerate(found.scores["validation/r2"], 1)
    ]
    assert "fold/test/r2" in above.data.metrics
    below = client.search_runs(
        [above.info.experiment_id], f"tags.`mlflow.parentRunId` = '{found.run_id}'"
    )
    assert {run.info.run_id for run in below} == {one.run_id for one in found.results}
    assert above.info.status == "FINISHED"
    again = pipeline.run_folds(tree, FOLDS)
    assert again.run_id == found.run_id
    assert [one.run_id for one in again.results] == [one.run_id for one in found.results]
    for key, num in (("validation/r2", 1), ("fold/validation/r2", FOLDS)):
        assert len(client.get_metric_history(found.run_id, key)) == num


def test_the_command_resumes_prints_a_table_and_ends_with_json(
    tree: dict[str, Any], tmp_path: Path, command: Command
) -> None:
    (tmp_path / "job.yaml").write_text(json.dumps(tree))
    code, out, err = command("run", tmp_path / "job.yaml", "--folds", FOLDS, "--json")
    assert code == 0, err
    said = json.loads(out)
    assert len(said["folds"]) == FOLDS
    assert "fold  3 of 3" in err
    assert "mean         std" in err
    code, out, err = command("run", tmp_path / "job.yaml", "--folds", FOLDS, "--json")
    assert "is finished already" in err
    assert json.loads(out)["means"] == said["means"]


@pytest.mark.parametrize("num", [0, 1, "3"])
def test_too_few_folds_are_refused(num: Any, tree: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--folds: expected 2 or more"):
        pipeline.run_folds(tree, num)


@pytest.mark.parametrize(
    ("validation", "message"),
    [("rows.parquet", "names files"), ({"fraction": 0.2, "time": "a"}, "has no folds")],
)
def test_what_has_no_folds_is_refused(validation: Any, message: str, tree: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=message):
        pipeline.run_folds(merged(tree, {"data.validation": validation}), FOLDS)


def test_folds_that_lack_rows_are_refused_before_any_is_trained(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    pd.read_parquet(tmp_path / "rows.parquet").iloc[:8].to_parquet(tmp_path / "few.parquet")
    few = merged(tree, {"data.train": str(tmp_path / "few.parquet"), "data.test": None,
                        "data.validation": 0.2})  # fmt: skip
    said: list[str] = []
    with pytest.raises(DataError, match=r"fold \d+ of 40: data.validation: fold \d+ of 40 of 8"):
        pipeline.run_folds(few, 40, say=said.append)
    assert not said
    assert not list((tmp_path / "runs").glob("cross-*"))
