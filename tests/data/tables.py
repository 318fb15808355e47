"""Small tables, and what the package makes of them: shared by the tests of rows and columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.feather
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.checks.job import check
from pipeline.data import cache
from pipeline.data.batch import Ragged
from pipeline.data.bind import fit_table as fit
from pipeline.data.columns import Field, encode
from pipeline.data.dataset import Dataset, build_dataset
from pipeline.spec import Cache, load
from pipeline.spec.data import Data
from pipeline.train.job import Job, prepare

MIXED = pa.table(
    {
        "amount": [1.0, 2.0, 3.0, 4.0],
        "count": [1, 2, 3, 4],
        "color": pa.array(["red", "blue", "red", "green"]),
        "coded": pa.array(["x", "y", "x", "y"]).dictionary_encode(),
        "flag": [True, False, True, True],
        "pair": pa.array([[1, 2], [3, 4], [5, 6], [7, 8]], pa.list_(pa.float32(), 2)),
        "grid": pa.array([[[1, 2], [3, 4]]] * 4, pa.list_(pa.list_(pa.float32(), 2), 2)),
        "words": pa.array([["a", "b"], ["c"], [], ["a"]]),
        "tokens": pa.array([[1, 2, 3], [4], [], [5, 6]]),
        "series": pa.array([[0.5], [1.0, 2.0], [], [3.0]]),
        "label": pa.array([10, 30, 10, 20]),
        "y": [0.0, 1.0, 0.0, 1.0],
    }
)


def write(folder: Path, table: pa.Table, name: str) -> str:
    path = folder / name
    if name.endswith(".parquet"):
        pq.write_table(table, path)
    elif name.endswith(".csv"):
        pacsv.write_csv(table, path)
    elif name.endswith(".feather"):
        pa.feather.write_feather(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    return name


def dataset_of(
    fields: list[Field], table: pa.Table, shift: dict[str, str] | None = None
) -> Dataset:
    return build_dataset(fields, encode(fields, table, shift), len(table), np.float32)


def batch_of(fields: list[Field], table: pa.Table, shift: dict[str, str] | None = None) -> Any:
    return dataset_of(fields, table, shift).gather(np.arange(len(table)))


def fitted(inputs: list[str], **options: Any) -> tuple[dict[str, Field], Any]:
    data = Data(train="x", inputs=inputs, target="y", **options)
    fields = fit(data, MIXED, {})
    return {f.name: f for f in fields}, batch_of(fields, MIXED)


def read(data: Data, base: Path) -> cache.ConvertedRows:
    return cache.load_or_convert(data, base, {}, np.float32, Cache())


NAN = float("nan")


PEOPLE = pa.table(
    {
        "age": pa.array([20.0, None, 40.0, 60.0, NAN, 40.0]),
        "city": pa.array(["A", "B", None, "A", "B", "C"]),
        "income": pa.array([0.0, 9.0, 99.0, 999.0, 9.0, 0.0]),
        "when": np.array(["2024-01-01T06", "2024-07-01T12", "2023-01-02T00"] * 2, "M8[us]"),
        "y": pa.array([1.0, 2.0, None, 4.0, 5.0, 6.0]),
    }
)  # fmt: skip


def people(folder: Path, table: pa.Table = PEOPLE, **data: Any) -> cache.ConvertedRows:
    pq.write_table(table, folder / "rows.parquet")
    made = Data(train="rows.parquet", target="y", **data)
    return cache.load_or_convert(made, folder, {}, np.float32, Cache())


def values_of(found: cache.ConvertedRows, name: str) -> Any:
    value: Any = found.train.gather(np.arange(len(found.train)))[name]
    return value.numpy()


RNG = np.random.default_rng(0)


def job_of(folder: Path, name: str, **changes: Any) -> Job:
    data = {"train": str(folder / name), "target": "y"} | changes.pop("data", {})
    return prepare(
        load({"name": "t", "loss": "mse", "model": "linear", "data": data} | changes), folder
    )


def numbers_of(made: Job, name: str) -> NDArray[Any]:
    found = made.train.gather(np.arange(made.num_rows))[name]
    assert not isinstance(found, Ragged)
    return found.numpy().copy()


def inputs(made: Job) -> list[str]:
    return [field.name for field in made.fields if field.is_input]


def notices(made: Job) -> str:
    return "\n".join(map(str, check(made)))


FRAME = pd.DataFrame({"a": RNG.normal(size=40), "y": RNG.normal(size=40)})


def vectors(values: Any, kind: str) -> pa.Array:
    if kind == "lists":
        return pa.array(values.tolist())
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


def converted(folder: Path, table: pa.Table | None = None, **data: Any) -> cache.ConvertedRows:
    if table is not None:
        pq.write_table(table, folder / "rows.parquet")
    given = {"train": "rows.parquet", "target": "y", "scale": "none"} | data
    return cache.load_or_convert(
        Data(**given), folder, {}, np.float32, Cache(folder=str(folder / "c"))
    )


def list_of(found: cache.ConvertedRows, name: str, split: str = "train") -> Any:
    store = getattr(found, split)
    return store.gather(np.arange(len(store)))[name].tolist()


def xy(x: Any, kind: pa.DataType | None = None) -> pa.Table:
    return pa.table({"x": pa.array(x, kind), "y": pa.array(np.arange(len(x)), pa.float64())})
