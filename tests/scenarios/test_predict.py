"""`pipeline predict`: what the served model says, file by file, the same bytes on any workers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from pyarrow import feather

import pipeline
from pipeline.errors import DataError, InputError, UsageError
from pipeline.inference import files as inference
from pipeline.launch.predict import predict
from pipeline.launch.result import Result
from tests.conftest import Command

CITIES = ["bern", "basel", "chur"]


def rows(num: int, seed: int) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    size = rng.normal(100, 20, num)
    return pd.DataFrame({
        "id": [f"{seed}-{index}" for index in range(num)], "size": size,
        "city": rng.choice(CITIES, num), "price": 3 * size + rng.normal(size=num),
        "sold": rng.choice(["no", "yes"], num),
    })  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("trained")
    rows(400, 0).to_parquet(folder / "rows.parquet")
    return pipeline.run({
        "name": "homes",
        "data": {"train": str(folder / "rows.parquet"), "inputs": ["size", "city"],
                 "target": ["price", "sold"]},
        "model": {"name": "mlp", "hidden": [8]},
        "loss": [{"name": "mse", "target": "price"},
                 {"name": "bce_with_logits", "target": "sold"}],
        "training": {"epochs": 2}, "storage": str(folder / "runs"),
    })  # fmt: skip


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    """Three files, of which one is longer than what is computed at once."""
    folder = tmp_path / "new"
    folder.mkdir()
    for name, num in (("a", 70_000), ("b", 3), ("c", 1500)):
        frame = rows(num, ord(name)).drop(columns=["price", "sold"])
        frame.to_parquet(folder / f"{name}.parquet", row_group_size=777)
    return [str(folder)]


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(folder.iterdir())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_predictions_are_those_of_the_recorded_model_beside_the_ids(
    trained: Result, inputs: list[str], tmp_path: Path
) -> None:
    made = predict(trained.storage, inputs, tmp_path / "out")
    assert [path.name for path in made.files] == ["a.parquet", "b.parquet", "c.parquet"]
    assert made.num_rows == 71_503
    for path in made.files:
        frame = pd.read_parquet(Path(inputs[0]) / path.name)
        found = pd.read_parquet(path)
        assert list(found["id"]) == list(frame["id"])
        assert list(found)[:3] == ["id", "price", "sold"]
        expected = trained.model.predict(frame[["size", "city"]])
        assert list(expected) == list(found)[1:]
        np.testing.assert_allclose(found["price"], expected["price"], rtol=1e-6)
        assert list(found["sold"]) == list(expected["sold"])


def test_any_number_of_workers_writes_the_same_bytes(
    trained: Result, inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = os.path.relpath(trained.storage)  # and workers run elsewhere
    for workers in (1, 2, 3):
        predict(model, inputs, f"on{workers}", workers=workers)
    wanted = hashes(tmp_path / "on1")
    assert all(hashes(tmp_path / f"on{workers}") == wanted for workers in (2, 3))


def test_a_worker_error_names_file_and_row(trained: Result, tmp_path: Path) -> None:
    for name in "abc":
        frame = rows(20, 1)
        if name == "b":
            frame.loc[13, "size"] = np.inf
        frame.to_parquet(tmp_path / f"{name}.parquet")
    files = [str(tmp_path / f"{name}.parquet") for name in "abc"]
    for workers in (1, 2):
        with pytest.raises(DataError, match=r"column 'size' .*row 13 of .*b\.parquet"):
            predict(trained.storage, files, tmp_path / f"out{workers}", workers=workers)
        assert not (tmp_path / f"out{workers}" / "b.parquet").exists()
    assert pq.read_metadata(tmp_path / "out1" / "a.parquet").num_rows == 20


def test_what_is_done_is_left_and_what_is_of_another_model_refused(
    trained: Result, inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    original, done = inference.predict_file, []

    def killed(model: Any, task: Any, *more: Any, **named: Any) -> int:
        if task.output.name == "b.parquet":
            raise KeyboardInterrupt
        done.append(task.output.name)
        return original(model, task, *more, **named)

    monkeypatch.setattr(inference, "predict_file", killed)
    with pytest.raises(KeyboardInterrupt):
        predict(trained.storage, inputs, out)
    monkeypatch.undo()
    assert (done, sorted(hashes(out))) == (["a.parquet"], ["a.parquet"])
    stamp = (out / "a.parquet").stat().st_mtime_ns
    assert predict(trained.storage, inputs, out).num_rows == 1503
    assert (out / "a.parquet").stat().st_mtime_ns == stamp
    assert predict(trained.storage, inputs, out).num_rows == 0
    with pytest.raises(UsageError, match=r"a\.parquet holds other predictions .*--fresh"):
        predict(trained.storage, inputs, out, keep=["size"])
    assert predict(trained.storage, inputs, out, keep=["size"], fresh=True).num_rows == 71_503
    assert pq.read_schema(out / "b.parquet").names[:2] == ["size", "price"]


@pytest.mark.parametrize(
    "write",
    [
        lambda table, path: pa_csv.write_csv(table, path.with_suffix(".csv")),
        lambda table, path: feather.write_feather(table, path.with_suffix(".feather")),
        lambda table, path: pq.write_table(table, path.with_suffix(".parquet")),
    ],
)
def test_formats_and_an_input_that_is_whole_numbers(
    write: Callable[[pa.Table, Path], None], trained: Result, tmp_path: Path
) -> None:
    frame = rows(30, 2).drop(columns=["price", "sold"]).assign(size=range(30))
    (tmp_path / "new").mkdir()
    write(pa.Table.from_pandas(frame, preserve_index=False), tmp_path / "new" / "rows")
    made = predict("homes-1", [str(tmp_path / "new")], tmp_path / "out",
                   storage=Path(trained.storage).parent)  # fmt: skip
    found = pd.read_parquet(made.files[0])
    expected = trained.model.predict(frame[["size", "city"]])
    np.testing.assert_allclose(found["price"], expected["price"], rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"size": "text"}, {}, r"rows.parquet: column 'size' holds .*string, expected numbers"),
        ({"city": 3}, {}, "column 'city' "),
        ({"city": None}, {}, r"column 'city' is not among those given.*the model reads size, city"),
        ({}, {"keep": ["idd"]}, r"--keep: column 'idd' is not there; did you mean 'id'"),
        ({}, {"keep": ["price"]}, "--keep: price is what the model predicts"),
        ({}, {"out": "s3://bucket/out"}, r"--out: s3://bucket/out is not a folder"),
        ({}, {"model": "nothing"}, "nothing is not the folder of a run, nor a run in .*runs"),
        ({}, {"model": "models:/no@champion"}, "models:/no@champion is no model in sqlite"),
        ({}, {"files": ["nowhere.csv"]}, "FILES: no such file or folder: nowhere.csv"),
        ({}, {"gpu": True}, "--gpu: there is no GPU that torch can use"),
    ],
)
def test_what_cannot_be_predicted_is_refused_before_anything_is_written(
    change: dict[str, Any], options: dict[str, Any], message: str, trained: Result,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    frame = rows(5, 3).assign(**change)
    frame = frame.drop(columns=[name for name, value in change.items() if value is None])
    frame.to_parquet(tmp_path / "rows.parquet")
    given = {"model": trained.storage, "files": ["rows.parquet"], "out": "out", **options}
    with pytest.raises(InputError, match=message):
        predict(**given)
    assert not (tmp_path / "out").exists()


def test_outputs_stand_as_the_files_do_below_the_folder_that_is_named(
    trained: Result, tmp_path: Path
) -> None:
    for name in ("day=1/part-0.2024.parquet", "day=2/part-0.2024.parquet"):
        path = tmp_path / "new" / name
        path.parent.mkdir(parents=True)
        rows(4, 4).to_parquet(path)
    made = predict(trained.storage, [str(tmp_path / "new")], tmp_path / "out")
    shown = [str(path.relative_to(tmp_path / "out")) for path in made.files]
    assert shown == ["day=1/part-0.2024.parquet", "day=2/part-0.2024.parquet"]
    each = [str(tmp_path / "new" / f"day={day}" / "*.parquet") for day in (1, 2)]
    with pytest.raises(UsageError, match=r"two files would be predicted into .*part-0\.2024"):
        predict(trained.storage, each, tmp_path / "flat")


def test_no_file_is_replaced_that_is_not_one_of_predictions(
    trained: Result, tmp_path: Path
) -> None:
    (tmp_path / "new").mkdir()
    rows(4, 4).to_parquet(tmp_path / "new" / "a.parquet")
    file = str(tmp_path / "new" / "a.parquet")
    for out in (tmp_path / "new", tmp_path / "new" / "out"):
        given = file if out.name == "new" else str(tmp_path / "new")
        with pytest.raises(UsageError, match="is where the files are"):
            predict(trained.storage, [given], out, fresh=True)
    (tmp_path / "out").mkdir()
    rows(1, 1).to_parquet(tmp_path / "out" / "a.parquet")
    with pytest.raises(UsageError, match="is not one of predictions"):
        predict(trained.storage, [file], tmp_path / "out", fresh=True)


def test_outputs_of_another_schema_are_not_left(trained: Result, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    frame = rows(4, 4).drop(columns=["price", "sold"])
    frame.assign(id=range(4)).to_csv(tmp_path / "new" / "a.csv", index=False)
    predict(trained.storage, [str(tmp_path / "new")], tmp_path / "out")
    frame.to_csv(tmp_path / "new" / "b.csv", index=False)  # ids are text in both by now
    with pytest.raises(UsageError, match="other predictions"):
        predict(trained.storage, [str(tmp_path / "new")], tmp_path / "out")
    predict(trained.storage, [str(tmp_path / "new")], tmp_path / "out", fresh=True)
    assert len(pq.read_table(tmp_path / "out")) == 8


def test_what_a_killed_command_left_is_deleted(
    trained: Result, inputs: list[str], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".b.parquet.1234-0ebf8267").write_bytes(b"half")
    predict(trained.storage, inputs, tmp_path / "out")
    assert sorted(hashes(tmp_path / "out")) == ["a.parquet", "b.parquet", "c.parquet"]


def test_categories_of_pandas_and_types_that_parquet_lacks(trained: Result, tmp_path: Path) -> None:
    frame = rows(9, 4).drop(columns=["price", "sold"]).astype({"city": "category"})
    feather.write_feather(frame, tmp_path / "new.feather")
    made = predict(trained.storage, [str(tmp_path / "new.feather")], tmp_path / "out")
    expected = trained.model.predict(frame[["size", "city"]])
    found = pd.read_parquet(made.files[0])
    np.testing.assert_allclose(found["price"], expected["price"], rtol=1e-6)
    spans = pa.array([(1, 2, 3)] * 9, pa.month_day_nano_interval())
    table = pa.Table.from_pandas(frame).append_column("span", spans)
    feather.write_feather(table, tmp_path / "odd.feather")
    with pytest.raises(UsageError, match="--keep: Parquet cannot hold these columns"):
        predict(trained.storage, [str(tmp_path / "odd.feather")], tmp_path / "odd")


def test_lists_of_which_the_first_is_empty(tmp_path: Path) -> None:
    tokens = pa.table({"tokens": [[], [1, 2, 3], [2]] * 8})
    pq.write_table(tokens, tmp_path / "train.parquet")
    result = pipeline.run({
        "name": "t", "loss": "cross_entropy", "storage": str(tmp_path / "runs"),
        "data": {"train": str(tmp_path / "train.parquet"), "inputs": ["tokens"], "target": "next",
                 "shift": {"next": "tokens"}},
        "model": {"name": "transformer", "width": 8, "num_layers": 1}, "training": {"epochs": 1},
    })  # fmt: skip
    for name, table in (("few", tokens.slice(0, 1)), ("all", tokens)):
        pq.write_table(table, tmp_path / f"{name}.parquet")
        made = predict(result.storage, [str(tmp_path / f"{name}.parquet")], tmp_path / name)
        found = pq.read_table(made.files[0])
        assert [len(row[0]) for row in found["next"].to_pylist()[:3]] == [0, 3, 1][: len(table)]


def test_the_command_says_what_it_made(
    trained: Result, inputs: list[str], tmp_path: Path, command: Command
) -> None:
    code, out, err = command(
        "predict", trained.storage, *inputs, "--out", tmp_path / "out", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["rows"] == 71_503
    assert "done  71,503 rows predicted" in err
