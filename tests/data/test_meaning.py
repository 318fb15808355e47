"""Columns are read as what they mean: indices, vectors, filled targets, units, ids."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray

import pipeline
from pipeline.checks.job import check
from pipeline.data.batch import Ragged
from pipeline.data.columns import encode
from pipeline.errors import DataError
from pipeline.spec import load
from pipeline.train.job import Job, prepare
from tests.conftest import Command, Write

RNG = np.random.default_rng(0)


def job(folder: Path, name: str, **changes: Any) -> Job:
    data = {"train": str(folder / name), "target": "y"} | changes.pop("data", {})
    return prepare(
        load({"name": "t", "loss": "mse", "model": "linear", "data": data} | changes), folder
    )


def column(made: Job, name: str) -> NDArray[Any]:
    found = made.train.gather(np.arange(made.num_rows))[name]
    assert not isinstance(found, Ragged)
    return found.numpy().copy()


def inputs(made: Job) -> list[str]:
    return [field.name for field in made.fields if field.is_input]


def notices(made: Job) -> str:
    return "\n".join(map(str, check(made)))


FRAME = pd.DataFrame({"a": RNG.normal(size=40), "y": RNG.normal(size=40)})


@pytest.mark.parametrize(
    ("write", "name", "index"),
    [
        (lambda frame, path: frame.to_csv(path), "rows.csv", ""),
        (lambda frame, path: frame.reset_index(names="Unnamed: 0").to_csv(path, index=False),
         "rows.csv", "Unnamed: 0"),
        (lambda frame, path: frame.set_index(frame.index.rename("row") ** 2).to_parquet(path),
         "rows.parquet", "row"),
        (lambda frame, path: frame.set_index(frame.index * 2 + 1).to_parquet(path),
         "rows.parquet", "__index_level_0__"),
    ],
)  # fmt: skip
def test_pandas_index_is_no_input(write: Any, name: str, index: str, tmp_path: Path) -> None:
    frame = FRAME.copy()
    frame.index = pd.Index(np.arange(40) ** 2 % 41) if "level" in index else frame.index
    write(frame, tmp_path / name)
    made = job(tmp_path, name)
    assert inputs(made) == ["a"]
    assert re.search(rf"data.inputs: '{index}': the index that pandas wrote", notices(made))
    if index:
        assert inputs(job(tmp_path, name, data={"inputs": [index, "a"]})) == [index, "a"]
    else:
        with pytest.raises(DataError, match=r"a column of .* has no name"):
            job(tmp_path, name, data={"inputs": ["", "a"]})


def test_a_column_that_counts_the_rows_is_pointed_out(tmp_path: Path) -> None:
    FRAME.assign(number=np.arange(1, 41), age=RNG.integers(1, 41, 40)).to_csv(
        tmp_path / "rows.csv", index=False
    )
    found = notices(job(tmp_path, "rows.csv", data={"validation": 0.25}))
    assert "column 'number': counts the rows" in found
    assert "'age'" not in found


def vectors(values: Any, kind: str) -> pa.Array:
    if kind == "lists":
        return pa.array(values.tolist())
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


@pytest.mark.parametrize("kind", ["fixed", "lists"])
def test_each_position_of_a_vector_has_its_own_mean_and_deviation(
    kind: str, tmp_path: Path
) -> None:
    values = RNG.normal(size=(300, 2)) * [1.0, 1000.0] + [0.0, 5e6]
    table = pa.table({"v": vectors(values, kind), "y": values[:, 0] * 2})
    pq.write_table(table, tmp_path / "rows.parquet")
    made = job(tmp_path, "rows.parquet")
    np.testing.assert_allclose(
        column(made, "v"), (values - values.mean(0)) / values.std(0), atol=1e-5
    )
    shared = job(tmp_path, "rows.parquet", data={"scale": {"v": "shared"}})
    wanted = (values - values.mean()) / values.std()
    np.testing.assert_allclose(column(shared, "v"), wanted, atol=1e-5)
    (field,) = [field for field in made.fields if field.is_input]
    served = encode([field], pa.table({"v": vectors(values[:3], kind)}))["v"]
    np.testing.assert_allclose(
        np.asarray(served), ((values - values.mean(0)) / values.std(0))[:3], atol=1e-5
    )
    with pytest.raises(DataError, match=r"do not hold .*2.* numbers"):
        encode([field], pa.table({"v": pa.array([[1.0, 2.0, 3.0]])}))


def test_scaled_vector_targets_are_served_in_their_own_unit(tmp_path: Path) -> None:
    from pipeline.train.evaluate import choose_metrics, evaluate

    values = RNG.normal(size=(50, 2)) * [1.0, 1000.0] + [0.0, 5e6]
    table = pa.table({"a": values[:, 0], "y": vectors(values, "fixed")})
    pq.write_table(table, tmp_path / "rows.parquet")
    made = job(tmp_path, "rows.parquet", data={"target_scale": "standard"})
    bound = made.objective()
    with torch.no_grad():
        raw = bound.predict(made.train.gather(np.arange(50)))["prediction"].numpy()
    metrics = choose_metrics(bound.terms, ["mae"])
    found = evaluate(bound, made.train, np.arange(50), 7, metrics, torch.device("cpu"))
    wanted = abs(raw * values.std(0) + values.mean(0) - values).mean(0).mean()
    assert found["mae"] == pytest.approx(wanted, rel=1e-5)


def test_missing_targets_are_filled_in_only_by_name_and_with_a_count(tmp_path: Path) -> None:
    y = FRAME["y"].where(FRAME.index % 4 > 0)
    FRAME.assign(y=y).to_csv(tmp_path / "rows.csv", index=False)
    with pytest.raises(DataError, match=r"data.target: column 'y' has missing values in 10 rows"):
        job(tmp_path, "rows.csv", data={"missing": "mean"})
    by_name = job(tmp_path, "rows.csv", data={"missing": {"y": "mean"}})
    assert "target 'y': 10 missing values are filled with" in notices(by_name)


def test_the_unit_of_a_losss_option_is_said(tmp_path: Path) -> None:
    FRAME.assign(y=FRAME["y"] * 100).to_csv(tmp_path / "rows.csv", index=False)
    loss = {"name": "huber", "delta": 50}
    found = notices(job(tmp_path, "rows.csv", loss=loss, data={"target_scale": "standard"}))
    deviation = (FRAME["y"] * 100).std(ddof=0)
    assert (
        f"delta 50 is in units of data.target_scale, {50 * deviation:.4g} in those of 'y'" in found
    )
    assert "delta" not in notices(job(tmp_path, "rows.csv", loss=loss))


@pipeline.losses.register("t_cox")
def t_cox(prediction: Any, target: Any) -> Any:
    return (prediction - target[:, 0]) ** 2 * target[:, 1]


def test_a_column_of_events_is_no_amount(tmp_path: Path) -> None:
    event = np.arange(40) % 2
    FRAME.assign(event=event).to_csv(tmp_path / "rows.csv", index=False)
    data = {"target": ["y", "event"], "target_scale": "standard", "inputs": ["a"]}
    made = job(tmp_path, "rows.csv", loss="t_cox", data=data)
    assert set(column(made, "event")) == {0, 1}
    assert column(made, "y").std() == pytest.approx(1, rel=1e-5)
    by_name = data | {"target_scale": {"y": "standard"}}
    assert set(column(job(tmp_path, "rows.csv", loss="mse", data=by_name), "event")) == {0, 1}


def test_whole_numbers_beyond_64_bits_are_read_by_their_names(
    job: Write, command: Command, tmp_path: Path
) -> None:
    ids = pa.array([2**64 - 1 - i % 3 for i in range(24)], pa.uint64())
    pq.write_table(pa.table({"id": ids, "y": RNG.normal(size=24)}), tmp_path / "ids.parquet")
    changes = {"data.train": "ids.parquet", "data.inputs": ["id"]}
    code, _, err = command("check", job(changes))
    assert code == 2
    assert "list the column in data.categorical" in err
    code, out, err = command("run", job({**changes, "data.categorical": ["id"]}))
    assert code == 0, out + err
