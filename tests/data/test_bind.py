"""How columns are read: as what losses and spec say of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import pipeline
from pipeline.errors import DataError
from tests.data.tables import FRAME, RNG, job_of, notices, numbers_of, vectors


def test_scaled_vector_targets_are_served_in_their_own_unit(tmp_path: Path) -> None:
    from pipeline.train.evaluate import evaluate
    from pipeline.train.term_metrics import choose_metrics

    values = RNG.normal(size=(50, 2)) * [1.0, 1000.0] + [0.0, 5e6]
    table = pa.table({"a": values[:, 0], "y": vectors(values, "fixed")})
    pq.write_table(table, tmp_path / "rows.parquet")
    made = job_of(tmp_path, "rows.parquet", data={"target_scale": "standard"})
    bound = made.objective()
    with torch.no_grad():
        raw = bound.predict(made.train.gather(np.arange(50)))["prediction"].numpy()
    metrics = choose_metrics(bound.terms, ["mae"])
    found = evaluate(bound, made.train, np.arange(50), 7, metrics, torch.device("cpu")).values
    wanted = abs(raw * values.std(0) + values.mean(0) - values).mean(0).mean()
    assert found["mae"] == pytest.approx(wanted, rel=1e-5)


def test_missing_targets_are_filled_in_only_by_name_and_with_a_count(tmp_path: Path) -> None:
    y = FRAME["y"].where(FRAME.index % 4 > 0)
    FRAME.assign(y=y).to_csv(tmp_path / "rows.csv", index=False)
    with pytest.raises(DataError, match=r"data.target: column 'y' has missing values in 10 rows"):
        job_of(tmp_path, "rows.csv", data={"missing": "mean"})
    by_name = job_of(tmp_path, "rows.csv", data={"missing": {"y": "mean"}})
    assert "target 'y': 10 missing values are filled with" in notices(by_name)


@pipeline.losses.register("t_cox")
def t_cox(prediction: Any, target: Any) -> Any:
    return (prediction - target[:, 0]) ** 2 * target[:, 1]


def test_a_column_of_events_is_no_amount(tmp_path: Path) -> None:
    event = np.arange(40) % 2
    FRAME.assign(event=event).to_csv(tmp_path / "rows.csv", index=False)
    data = {"target": ["y", "event"], "target_scale": "standard", "inputs": ["a"]}
    made = job_of(tmp_path, "rows.csv", loss="t_cox", data=data)
    assert set(numbers_of(made, "event")) == {0, 1}
    assert numbers_of(made, "y").std() == pytest.approx(1, rel=1e-5)
    by_name = data | {"target_scale": {"y": "standard"}}
    assert set(numbers_of(job_of(tmp_path, "rows.csv", loss="mse", data=by_name), "event")) == {
        0,
        1,
    }
