"""Names of the user's reach MLflow as they are or marked; none is refused after the training."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.entities import Metric, Param
from mlflow.utils.validation import _validate_metric_name, _validate_param

import pipeline
from pipeline.tracking.names import mlflow_key

NAMES = st.text(
    st.one_of(st.sampled_from("/.\\ :-_()[]%#"), st.characters(exclude_categories=["Cs"])),
    min_size=1, max_size=300,
)  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(name=NAMES)
def test_every_name_becomes_a_key_that_mlflow_takes(name: str) -> None:
    key = mlflow_key(f"validation/{name}")
    _validate_metric_name(key)
    _validate_param(key, "1")
    assert len(key) <= 250
    assert mlflow_key(key) == key


@settings(max_examples=300, deadline=None)
@given(one=NAMES, other=NAMES)
def test_two_names_never_become_one_key(one: str, other: str) -> None:
    assert (mlflow_key(one) == mlflow_key(other)) == (one == other)


@pytest.mark.parametrize("name", ["flow m//s", "ä" * 200, "a.b: (c) #1"])
def test_a_run_with_odd_names_is_recorded(name: str, tmp_path: Path) -> None:
    columns = [name, f"also {name}", f"in {name}"]
    header = ",".join(f'"{column}"' for column in columns)
    rows = [f"{i}.5,{i % 5}.5,{i % 7}" for i in range(40)]
    (tmp_path / "rows.csv").write_text("\n".join([header, *rows]) + "\n")
    terms = [{"name": "mse", "prediction": f"p{i}", "target": columns[i]} for i in range(2)]
    result = pipeline.run(
        {
            "name": "odd", "model": "linear", "loss": terms, "storage": str(tmp_path / "runs"),
            "data": {"train": str(tmp_path / "rows.csv"), "target": columns[:2], "validation": 0.3},
            "training": {"epochs": 2, "batch_size": 8},
        }
    )  # fmt: skip
    assert result.state == "finished"
    run = mlflow.MlflowClient(result.tracking_uri).get_run(result.run_id)
    assert run.info.status == "FINISHED"
    for key in result.metrics:
        assert mlflow_key(f"validation/{key}") in run.data.metrics
    predicted = result.model.predict(pd.DataFrame({f"in {name}": [1, 2]}, index=[7, 3]))
    assert list(predicted.index) == [7, 3]
    assert set(columns[:2]) <= set(predicted.columns)


@pytest.mark.parametrize(
    "name", ["flow m//s", "a(1)", "a[1]", "../x", "x/", "ä b", "€" * 300, "a\nb"]
)
def test_the_real_store_takes_it(name: str, tmp_path: Path) -> None:
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    run = client.create_run(client.create_experiment("e", artifact_location=str(tmp_path)))
    key = mlflow_key(f"validation/{name}")
    client.log_batch(run.info.run_id, metrics=[Metric(key, 1.0, 0, 0)], params=[Param(key, "1")])
    found = client.get_run(run.info.run_id).data
    assert found.metrics == {key: 1.0}
    assert found.params == {key: "1"}
