"""The recorded model takes the data frames that people have, or says which column is not right."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from packaging.version import Version

import pipeline

RNG = np.random.default_rng(0)
ROWS = pd.DataFrame(
    {
        "rooms": RNG.integers(1, 9, 60).astype(float),
        "size": RNG.normal(50, 9, 60),
        "city": RNG.choice(["Bonn", "Ulm"], 60),
        "code": RNG.integers(1, 4, 60),
        "new": RNG.random(60) < 0.5,
        "price": RNG.normal(size=60),
    }
)
ROWS.loc[::7, "rooms"] = np.nan
ROWS.loc[3, "city"] = None


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the model, in a store of its own."""
    folder = tmp_path_factory.mktemp("served")
    ROWS.astype({"rooms": "Int64"}).to_csv(folder / "rows.csv", index=False)
    spec = {
        "name": "served", "model": "linear", "loss": "mse", "storage": str(folder / "runs"),
        "data": {"train": str(folder / "rows.csv"), "target": "price", "categorical": ["code"],
                 "missing": {"rooms": "mean", "city": "category"}},
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        result = pipeline.run(spec)
        mlflow.set_tracking_uri(result.tracking_uri)
        yield f"runs:/{result.run_id}/model"
        mlflow.set_tracking_uri("")


@pytest.fixture(scope="module")
def model(place: str) -> Any:
    return mlflow.pyfunc.load_model(place)


FRAME = ROWS.head(8).drop(columns="price")


@pytest.mark.parametrize(
    "types",
    [
        {}, {"city": "category"}, {"rooms": "Int64"}, {"new": "boolean"}, {"city": "string"},
        {"code": "Int64"}, {"code": "category"}, {"new": object}, {"rooms": "float32"},
        {"city": "category", "rooms": "Int64", "new": "boolean", "code": "UInt8"},
    ],
    ids=str,
)  # fmt: skip
def test_frames_of_any_pandas_type_give_the_same_predictions(types: Any, model: Any) -> None:
    wanted = model.predict(FRAME)["price"].to_numpy()
    np.testing.assert_allclose(model.predict(FRAME.astype(types))["price"], wanted)


def test_whole_numbers_are_taken_where_fractions_were(model: Any) -> None:
    whole = FRAME.assign(rooms=3, size=50)
    wanted = model.predict(whole.astype({"rooms": float, "size": float}))["price"]
    np.testing.assert_allclose(model.predict(whole)["price"], wanted)


def test_an_optional_column_may_be_absent(model: Any) -> None:
    wanted = model.predict(FRAME.assign(rooms=np.nan, city=None))["price"]
    np.testing.assert_allclose(
        model.predict(FRAME.drop(columns=["rooms", "city"]))["price"], wanted
    )


def test_the_example_is_valid_json(place: str) -> None:
    """Which knows no NaN: servers in other languages refuse it."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    for name in ("input_example.json", "serving_input_example.json"):
        text = Path(mlflow.artifacts.download_artifacts(f"{place}/{name}")).read_text()
        assert "null" in json.dumps(json.loads(text, parse_constant=refuse))


def test_a_column_that_is_needed_and_absent_is_named(model: Any) -> None:
    with pytest.raises(Exception, match=r"size"):
        model.predict(FRAME.drop(columns="size"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": "large"}, r"column 'size' holds string, expected numbers"),
        ({"city": 5}, r"column 'city' is int64; the training rows had string, such as 'Bonn'"),
        ({"code": "two"}, r"column 'code' is string; the training rows had int64, such as 1"),
    ],
    ids=str,
)
def test_served_values_of_another_type_are_refused_by_column(
    changes: Any, message: str, model: Any
) -> None:
    with pytest.raises(Exception, match=message):
        model.predict(FRAME.assign(**changes))


def test_dates_are_read_as_text_and_in_any_time_zone(tmp_path: Path) -> None:
    days = pd.date_range("2020-01-01", periods=60, freq="17h")
    rows = pd.DataFrame({"joined": days.strftime("%Y-%m-%d %H:%M:%S"), "y": np.arange(60.0)})
    rows.to_csv(tmp_path / "rows.csv", index=False)
    model = pipeline.run(
        {
            "name": "dates", "model": "linear", "loss": "mse", "storage": str(tmp_path / "runs"),
            "data": {"train": str(tmp_path / "rows.csv"), "target": "y", "dates": ["joined"]},
            "training": {"epochs": 1},
        }
    ).model  # fmt: skip
    expected = model.predict(rows)["y"]
    assert expected.nunique() > 50
    for given in (days, days.tz_localize("UTC").tz_convert("Asia/Tokyo")):
        assert model.predict(pd.DataFrame({"joined": given}))["y"].tolist() == expected.tolist()
    with pytest.raises(Exception, match="column 'joined' holds text that is not a date"):
        model.predict(pd.DataFrame({"joined": ["soon"]}))


def test_its_requirements_can_be_installed_from_an_index(
    place: str,
) -> None:
    text = Path(mlflow.artifacts.download_artifacts(f"{place}/requirements.txt")).read_text()
    pins = dict(line.split("==") for line in text.split() if "==" in line)
    assert {"torch", "numpy", "pandas", "pyarrow"} <= set(pins)
    assert not any(Version(version).local for version in pins.values())


def test_the_served_model_takes_raw_columns_with_missing_values(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    amounts = rng.normal(50, 10, 300)
    table = pa.table(
        {
            "age": pa.array(np.where(rng.random(300) < 0.2, np.nan, amounts)),
            "city": pa.array([None if i % 7 == 0 else "AB"[i % 2] for i in range(300)]),
            "when": pa.array(np.datetime64("2024-01-01") + np.arange(300)),
            "y": pa.array(amounts / 10 + np.arange(300) % 2),
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    result = pipeline.run(
        {
            "name": "raw",
            "data": {"train": str(tmp_path / "rows.parquet"), "target": "y", "validation": 0.2,
                     "dates": {"when": ["week"]}, "missing": {"age": "mean", "city": "category"}},
            "model": {"name": "mlp", "hidden": [8]}, "loss": "mse",
            "training": {"epochs": 3, "batch_size": 16}, "storage": str(tmp_path / "runs"),
        }
    )  # fmt: skip
    frame = pd.DataFrame(
        {"age": [40.0, np.nan], "city": ["A", None], "when": pd.to_datetime(["2024-02-01"] * 2)}
    )
    frame["when"] = frame["when"].dt.date
    said = result.model.predict(frame)["y"]
    assert np.isfinite(said).all()
    fields = json.loads((Path(result.storage) / "record.json").read_text())["fields"]
    mean = next(field["fill"] for field in fields if field["name"] == "age")
    again = result.model.predict(frame.assign(age=[40.0, mean]))["y"]
    assert again.tolist() == said.tolist()


def test_a_served_row_may_miss_any_value_that_has_a_policy(tmp_path: Path) -> None:
    whole = pa.array([None if i == 250 else i % 9 for i in range(300)])
    when = pa.array(np.datetime64("2024-01-01") + np.arange(300)).cast(pa.timestamp("us", "UTC"))
    table = pa.table({"rooms": whole, "when": when, "y": np.arange(300.0)})
    pq.write_table(table, tmp_path / "rows.parquet")
    result = pipeline.run(
        {
            "name": "holes",
            "data": {"train": str(tmp_path / "rows.parquet"), "target": "y", "dates": ["when"],
                     "missing": {"rooms": "mean"}, "target_scale": "standard"},
            "model": "linear", "loss": "mse", "training": {"epochs": 1, "batch_size": 50},
            "storage": str(tmp_path / "runs"),
        }
    )  # fmt: skip
    assert result.state == "finished", "although MLflow's schemas know no time zones"
    frame = pd.DataFrame({"rooms": [np.nan], "when": pd.to_datetime(["2024-02-01"])})
    assert np.isfinite(result.model.predict(frame)["y"]).all()
    assert len(result.model.predict(frame.head(0))) == 0
