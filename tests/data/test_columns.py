"""From files to tensors: types, preprocessing from the training rows only, every format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from pipeline.data import cache
from pipeline.data.batch import Ragged
from pipeline.data.bind import fit_table as fit
from pipeline.data.columns import Field, Reading, encode, from_json
from pipeline.data.dataset import Dataset, in_memory
from pipeline.errors import DataError
from pipeline.spec import Cache
from pipeline.spec.data import Data

TABLE = pa.table(
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


def store(fields: list[Field], table: pa.Table, shift: dict[str, str] | None = None) -> Dataset:
    return in_memory(fields, encode(fields, table, shift), len(table), np.float32)


def batch_of(fields: list[Field], table: pa.Table, shift: dict[str, str] | None = None) -> Any:
    return store(fields, table, shift).gather(np.arange(len(table)))


def fitted(inputs: list[str], **options: Any) -> tuple[dict[str, Field], Any]:
    data = Data(train="x", inputs=inputs, target="y", **options)
    fields = fit(data, TABLE, {})
    return {f.name: f for f in fields}, batch_of(fields, TABLE)


def read(data: Data, base: Path) -> cache.Converted:
    return cache.rows(data, base, {}, np.float32, Cache())


def test_numbers_are_standardised_with_the_training_rows_mean() -> None:
    fields, columns = fitted(["amount", "count"])
    assert fields["amount"].mean == 2.5
    assert float(columns["amount"].mean()) == pytest.approx(0, abs=1e-6)
    assert float(columns["amount"].std(correction=0)) == pytest.approx(1)
    assert columns["count"].dtype == torch.float32


def test_scale_none_leaves_numbers_as_they_are() -> None:
    _, columns = fitted(["amount"], scale="none")
    assert columns["amount"].tolist() == [1, 2, 3, 4]


def test_text_booleans_and_dictionaries_become_codes_from_one() -> None:
    fields, columns = fitted(["color", "coded", "flag"])
    assert fields["color"].vocabulary == ("blue", "green", "red")
    assert columns["color"].tolist() == [3, 1, 3, 2]
    assert columns["coded"].tolist() == [1, 2, 1, 2]
    assert columns["flag"].tolist() == [2, 1, 2, 2]
    assert fields["color"].num_codes == 4


def test_whole_numbers_can_be_names() -> None:
    fields, columns = fitted(["label"], categorical=["label"])
    assert fields["label"].vocabulary == (10, 20, 30)
    assert columns["label"].tolist() == [1, 3, 1, 2]


def test_fixed_lists_become_tensors() -> None:
    fields, columns = fitted(["pair", "grid"], scale="none")
    assert columns["pair"].tolist() == [[1, 2], [3, 4], [5, 6], [7, 8]]
    assert fields["grid"].shape == (2, 2)
    assert columns["grid"].shape == (4, 2, 2)


def test_lists_become_padded_batches_with_lengths() -> None:
    fields, _ = fitted(["tokens", "words", "series"], scale="none")
    batch = store(list(fields.values()), TABLE).gather(np.array([3, 0, 2]))
    tokens = batch["tokens"]
    assert isinstance(tokens, Ragged)
    assert tokens.values.tolist() == [[5, 6, 0], [1, 2, 3], [0, 0, 0]]
    assert tokens.lengths.tolist() == [2, 3, 0]
    assert tokens.mask.tolist() == [[True, True, False], [True] * 3, [False] * 3]
    assert fields["tokens"].num_codes == 7
    assert fields["words"].vocabulary == ("a", "b", "c")
    series = batch["series"]
    assert isinstance(series, Ragged)
    assert series.values.tolist() == [[3.0], [0.5], [0.0]]


def test_unknown_categories_get_the_code_of_the_unknown() -> None:
    fields, _ = fitted(["color"])
    other = pa.table({"color": ["pink", "red", None]})
    columns = batch_of([fields["color"]], other)
    assert columns["color"].tolist() == [0, 3, 0]


def test_target_classes_keep_the_order_of_their_labels() -> None:
    data = Data(train="x", inputs=["amount"], target="label")
    fields = fit(data, TABLE, {"label": Reading(as_classes=True)})
    assert fields[-1].counts == (2, 1, 1)
    columns = batch_of(fields, TABLE)
    assert columns["label"].tolist() == [0, 2, 0, 1]


def test_ignored_class_numbers_are_no_class() -> None:
    table = pa.table({"x": [1.0, 2.0, 3.0], "k": [5, -100, 7]})
    fields = fit(
        Data(train="x", inputs=["x"], target="k"),
        table,
        {"k": Reading(as_classes=True, ignored=-100)},
    )
    assert fields[-1].vocabulary == (5, 7)
    columns = batch_of(fields, table)
    assert columns["k"].tolist() == [0, -100, 1]


def test_a_shifted_target_is_the_next_item() -> None:
    data = Data(train="x", inputs=["tokens"], target="next", shift={"next": "tokens"})
    fields = fit(data, TABLE, {"next": Reading(as_classes=True, ignored=-100)})
    lists = batch_of(fields, TABLE, data.shift)["next"]
    assert isinstance(lists, Ragged)
    assert lists.padded(-100).tolist() == [[2, 3], [-100, -100], [-100, -100], [6, -100]]


def test_fields_travel_as_json() -> None:
    fields, _ = fitted(["amount", "color", "grid", "words"])
    for field in fields.values():
        assert from_json(field.to_json()) == field


@pytest.mark.parametrize("name", ["r.parquet", "r.arrow", "r.feather", "r.csv"])
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    table = TABLE.select(["amount", "count", "color", "y"])
    write(tmp_path, table, name)
    found = read(Data(train=name, target="y", scale="none"), tmp_path)
    assert [field.name for field in found.fields] == ["amount", "count", "color", "y"]
    batch: Any = found.train.gather(np.arange(4))
    assert batch["amount"].tolist() == table["amount"].to_pylist()
    assert batch["color"].tolist() == [3, 1, 3, 2]
    assert found.example.to_pylist() == table.drop_columns("y").to_pylist()


def test_the_layout_of_files_changes_neither_rows_nor_fingerprint(tmp_path: Path) -> None:
    table = TABLE.select(["amount", "y"])
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    write(tmp_path, table, "one/all.parquet")
    write(tmp_path, table.slice(0, 1), "two/a.parquet")
    write(tmp_path, table.slice(1), "two/b.parquet")
    write(tmp_path, table.slice(0, 3), "three.parquet")

    def rows(train: str | list[str]) -> cache.Converted:
        return read(Data(train=train, target="y"), tmp_path)

    found = [rows(t) for t in ("one", "two", "two/*.parquet", ["two/a.parquet", "two/b.parquet"])]
    found.append(rows((tmp_path / "two").as_uri()))
    assert len({one.fingerprint for one in found}) == 1
    assert all((one.train.records == found[0].train.records).all() for one in found)
    assert rows("three.parquet").fingerprint != found[0].fingerprint


def test_preprocessing_does_not_see_the_validation_rows(tmp_path: Path) -> None:
    write(tmp_path, pa.table({"x": [0.0, 2.0], "y": [0.0, 1.0]}), "train.parquet")
    write(tmp_path, pa.table({"x": [100.0], "y": [0.0]}), "held.parquet")
    found = read(Data(train="train.parquet", validation="held.parquet", target="y"), tmp_path)
    assert (found.fields[0].mean, found.fields[0].deviation) == (1.0, 1.0)
    assert found.validation is not None
    held = found.validation.gather(np.arange(1))["x"]
    assert isinstance(held, Tensor)
    assert held.tolist() == [99.0]


def test_a_secret_in_a_uri_is_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(DataError) as raised:
        read(Data(train="nope://user:hunter2@host/x.csv?key=hunter3", target="y"), tmp_path)
    assert "hunter" not in str(raised.value)
    assert "host/x.csv" in str(raised.value)


def test_only_lists_of_tokens_can_be_shifted() -> None:
    """Others would be compared with themselves."""
    data = Data(train="x", inputs=["series"], target="next", shift={"next": "series"})
    with pytest.raises(DataError, match="lists of tokens can be shifted"):
        fit(data, TABLE, {"next": Reading()})
