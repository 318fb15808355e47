"""Missing values, scales, dates, images and text: what they become, in training and when served."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import pipeline
from pipeline.data import cache
from pipeline.errors import DataError
from pipeline.spec import Cache
from pipeline.spec.data import Data
from tests.conftest import Command, Write

NOTHING = float("nan")
TABLE = pa.table(
    {
        "age": pa.array([20.0, None, 40.0, 60.0, NOTHING, 40.0]),
        "city": pa.array(["A", "B", None, "A", "B", "C"]),
        "income": pa.array([0.0, 9.0, 99.0, 999.0, 9.0, 0.0]),
        "when": np.array(["2024-01-01T06", "2024-07-01T12", "2023-01-02T00"] * 2, "M8[us]"),
        "y": pa.array([1.0, 2.0, None, 4.0, 5.0, 6.0]),
    }
)  # fmt: skip


def rows(folder: Path, table: pa.Table = TABLE, **data: Any) -> cache.Converted:
    pq.write_table(table, folder / "rows.parquet")
    made = Data(train="rows.parquet", target="y", **data)
    return cache.rows(made, folder, {}, np.float32, Cache())


def column(found: cache.Converted, name: str) -> Any:
    value: Any = found.train.gather(np.arange(len(found.train)))[name]
    return value.numpy()


def test_missing_values_are_refused_unless_the_spec_says_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(DataError) as raised:
        rows(tmp_path, inputs=["age", "city"])
    text = str(raised.value)
    assert "data.inputs: column 'age' has missing values in 2 rows, first at row 1, 4" in text
    assert "data.inputs: column 'city' has missing values in 1 row, first at row 2" in text
    assert "data.target: column 'y' has missing values in 1 row, first at row 2" in text
    assert "data.missing" in text


def test_rows_with_missing_values_can_be_dropped(tmp_path: Path) -> None:
    found = rows(tmp_path, inputs=["age", "city"], missing="drop", scale="none")
    assert column(found, "age").tolist() == [20, 60, 40]
    assert column(found, "y").tolist() == [1, 4, 6]
    assert found.facts.dropped == 3
    assert found.fields[0].mean == 0


def test_each_column_can_have_its_own_policy(tmp_path: Path) -> None:
    policy: Any = {"age": "mean", "city": "category", "y": "drop"}
    found = rows(tmp_path, inputs=["age", "city"], missing=policy, scale="none")
    assert column(found, "age").tolist() == [20, 40, 60, 40, 40]
    assert column(found, "city").tolist() == [1, 2, 1, 2, 3]
    assert found.fields[1].num_codes == 5, "unknown, A, B, C, missing"
    policy = {"age": {"constant": -1}, "city": {"constant": "Z"}, "y": {"constant": 0}}
    found = rows(tmp_path, inputs=["age", "city"], missing=policy, scale="none")
    assert column(found, "age").tolist() == [20, -1, 40, 60, -1, 40]
    assert column(found, "city").tolist() == [1, 2, 4, 1, 2, 3]
    assert column(found, "y").tolist() == [1, 2, 0, 4, 5, 6]
    missing = rows(tmp_path, inputs=["city"], missing={"city": "category", "y": "drop"})
    assert missing.fields[0].num_codes == 5


def test_the_mean_is_that_of_the_training_rows(tmp_path: Path) -> None:
    table = pa.table({"x": [1.0, 3.0, None, 100.0], "day": [1, 2, 3, 4], "y": [1.0, 2, 3, 4]})
    split: Any = {"since": 3, "time": "day"}
    found = rows(tmp_path, table, inputs=["x"], missing="mean", scale="none", validation=split)
    assert found.validation is not None
    held: Any = found.validation.gather(np.arange(2))["x"]
    assert held.tolist() == [2, 100]


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ({"city": "mean", "y": "drop", "age": "mean"}, "data.missing.city"),
        ({"age": "category", "y": "drop"}, "data.missing.age"),
        ({"age": {"constant": "x"}, "y": "drop"}, "'x', which is not a number"),
        ({"town": "drop"}, "data.missing: 'town'"),
        ("mean", "column 'city' has missing values in 1"),
    ],
)
def test_policies_that_do_not_fit_are_refused(missing: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        rows(tmp_path, inputs=["age", "city"], missing=missing)


def test_infinity_is_never_taken(tmp_path: Path) -> None:
    table = pa.table({"x": [1.0, float("inf")], "y": [1.0, 2.0]})
    with pytest.raises(DataError, match=r"'x' has infinity.* in 1 row, first at row 1"):
        rows(tmp_path, table, missing="drop")


def test_a_column_of_nothing_is_refused(tmp_path: Path) -> None:
    table = pa.table({"x": pa.array([None, None], pa.float64()), "y": [1.0, 2.0]})
    with pytest.raises(DataError, match="no value in any training row"):
        rows(tmp_path, table, missing="mean")
    with pytest.raises(DataError, match=r"no rows in .*2 dropped"):
        rows(tmp_path, table, missing="drop")


def test_the_file_of_a_bad_row_is_named(tmp_path: Path) -> None:
    for name, x in (("a", [1.0, 2.0]), ("b", [3.0, None])):
        pq.write_table(pa.table({"x": x, "y": [1.0, 2.0]}), tmp_path / f"{name}.parquet")
    data = Data(train="*.parquet", target="y")
    with pytest.raises(DataError, match=r"first at row 1 of .*b\.parquet"):
        cache.rows(data, tmp_path, {}, np.float32, Cache())


def test_numbers_can_be_scaled_by_range_or_logarithm(tmp_path: Path) -> None:
    scale: Any = {"income": "log", "age": "min_max"}
    missing: Any = {"age": "mean", "y": "drop"}
    found = rows(tmp_path, inputs=["age", "income"], scale=scale, missing=missing)
    assert column(found, "age").tolist() == [0, 0.5, 1, 0.5, 0.5]
    logs = np.log1p([0.0, 9.0, 999.0, 9.0, 0.0])
    expected = (logs - logs.mean()) / logs.std()
    assert column(found, "income") == pytest.approx(expected, rel=1e-6)
    table = pa.table({"x": [0.0, -1.0], "y": [1.0, 2.0]})
    with pytest.raises(DataError, match="above -1"):
        rows(tmp_path, table, scale="log")


def test_dates_become_days_gone_by_and_places_in_cycles(tmp_path: Path) -> None:
    found = rows(tmp_path, inputs=["when"], dates=["when"], missing="drop")
    made = column(found, "when")
    assert made.shape == (5, 7)
    assert made[:, 0].mean() == pytest.approx(0, abs=1e-6)
    assert made[0, 1:3] == pytest.approx([0.0043, 1.0], abs=1e-3), "the year's first day, at six"
    assert made[0, 5:] == pytest.approx([1, 0], abs=1e-6), "a quarter of the day"
    assert made[1, 5:] == pytest.approx([0, -1], abs=1e-6), "noon"
    parts: Any = {"when": ["week"]}
    week = column(rows(tmp_path, inputs=["when"], dates=parts, missing="drop"), "when")
    assert week.shape == (5, 2)
    with pytest.raises(DataError, match=r"data\.dates: column 'age'"):
        rows(tmp_path, inputs=["age"], dates=["age"], missing="drop")


def png(value: int, size: tuple[int, int] = (6, 4)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, (value, 0, 255)).save(content, "PNG")
    return content.getvalue()


def test_images_are_decoded_by_the_feed(tmp_path: Path) -> None:
    table = pa.table({"photo": [png(0), png(255, (12, 8))], "y": [0.0, 1.0]})
    images: Any = {"photo": {"size": [4, 6]}}
    found = rows(tmp_path, table, images=images)
    made = column(found, "photo")
    assert made.shape == (2, 3, 4, 6)
    assert made[0, :, 0, 0].tolist() == [-1, -1, 1]
    assert made[1, :, 3, 5].tolist() == [1, -1, 1], "twice the size, made smaller"
    grey = column(rows(tmp_path, table, images={"photo": {"size": [4, 6], "mode": "L"}}), "photo")
    assert grey.shape == (2, 4, 6)
    broken = pa.table({"photo": [png(0), b"no image"], "y": [0.0, 1.0]})
    with pytest.raises(DataError, match=r"'photo' has no readable image in 1 row, first at row 1"):
        rows(tmp_path, broken, images=images)


def test_text_goes_through_a_tokenizer_file(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]")
    made = tokenizers.Tokenizer(words)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    table = pa.table({"text": ["a b", "c", "b b a"], "y": [0.0, 1.0, 2.0]})
    found = rows(tmp_path, table, tokenizers={"text": "tokenizer.json"})
    tokens: Any = found.train.gather(np.arange(3))["text"]
    assert tokens.values.tolist() == [[1, 2, 0], [0, 0, 0], [2, 2, 1]]
    assert tokens.lengths.tolist() == [2, 1, 3]
    assert found.fields[0].num_codes == 3
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"not a tokenizer\.json"):
        rows(tmp_path, table, tokenizers={"text": "tokenizer.json"})


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


def test_a_cnn_reads_encoded_images(tmp_path: Path) -> None:
    photos = [png(40 * (i % 6), (8, 8)) for i in range(24)]
    table = pa.table({"photo": photos, "y": [float(i % 6) for i in range(24)]})
    pq.write_table(table, tmp_path / "rows.parquet")
    result = pipeline.run(
        {
            "name": "photos",
            "data": {"train": str(tmp_path / "rows.parquet"), "target": "y",
                     "images": {"photo": {"size": [8, 8]}}},
            "model": {"name": "cnn", "channels": [4], "hidden": 8}, "loss": "mse",
            "optimizer": {"name": "adam", "lr": 0.01},
            "training": {"epochs": 30, "batch_size": 8}, "storage": str(tmp_path / "runs"),
        }
    )  # fmt: skip
    assert result.losses[0] is not None
    assert result.losses[-1] is not None
    assert result.losses[-1] < result.losses[0] / 2
    said = result.model.predict(pd.DataFrame({"photo": photos[:6]}))["y"]
    assert said.is_monotonic_increasing


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"missing": {"a": "men"}}, "a: expected error, drop, mean, category or {constant: value}; "
                                    "found 'men'; did you mean 'mean'?"),
        ({"missing": 0}, "(a constant goes by column)"),
        ({"scale": {"a": "minmax"}}, "a: expected standard, shared, min_max, log, none; "
                                     "found 'minmax'; did you mean 'min_max'?"),
        ({"dates": {"a": ["weak"]}}, "did you mean 'week'?"),
        ({"dates": "a"}, "expected a list of columns: [a]"),
        ({"validation": {"fraction": 0.2, "grup": "a"}},
         "grup: unknown key; did you mean 'group'?"),
        ({"validation": {"fraction": 0.2}}, "give either `group` or `time`"),
        ({"validation": {"time": "a"}}, "give either `fraction`, or with `time` its `since`"),
    ],
)  # fmt: skip
def test_a_slip_in_the_spec_is_one_clear_fault(
    change: dict[str, Any], said: str, job: Write, command: Command
) -> None:
    changes = {f"data.{key}": value for key, value in change.items()}
    code, _, err = command("check", job(changes))
    assert code == 2
    assert said in err
    assert "1 fault" in err or "faults" not in err
