"""Rows that were once read wrongly, or ended in a traceback."""

from __future__ import annotations

import fcntl
import os
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data import cache
from pipeline.errors import DataError
from pipeline.spec import Cache
from pipeline.spec.data import Data


def rows(folder: Path, table: pa.Table | None = None, **data: Any) -> cache.Converted:
    if table is not None:
        pq.write_table(table, folder / "rows.parquet")
    given = {"train": "rows.parquet", "target": "y", "scale": "none"} | data
    return cache.rows(Data(**given), folder, {}, np.float32, Cache(folder=str(folder / "c")))


def column(found: cache.Converted, name: str, split: str = "train") -> Any:
    store = getattr(found, split)
    return store.gather(np.arange(len(store)))[name].tolist()


def xy(x: Any, kind: pa.DataType | None = None) -> pa.Table:
    return pa.table({"x": pa.array(x, kind), "y": pa.array(np.arange(len(x)), pa.float64())})


def test_one_unseen_category_does_not_change_the_others(tmp_path: Path) -> None:
    pq.write_table(xy([1, 2, 3, 2**63], pa.uint64()), tmp_path / "held.parquet")
    found = rows(tmp_path, xy([1, 2, 3], pa.uint64()), validation="held.parquet", categorical=["x"])
    assert column(found, "x", "validation") == [1, 2, 3, 0]
    assert column(rows(tmp_path, xy([2**64 - 1, 1], pa.uint64()), categorical=["x"]), "x") == [2, 1]


def test_missing_is_not_zero_to_the_fingerprint(tmp_path: Path) -> None:
    one = rows(tmp_path, xy([1.0, 2, None, 3, None, None, 4, None]), missing="mean")
    other = rows(tmp_path, xy([1.0, 2, 0, 3, 0, 0, 4, 0]), missing="mean")
    assert one.fingerprint != other.fingerprint


def test_the_fingerprint_is_that_of_the_rows_not_of_the_format(tmp_path: Path) -> None:
    when = pa.array(np.arange(5).astype("M8[s]"))
    lists = pa.array([[1], [2, 3], [], [4], [5]])
    table = xy([1.0] * 5).append_column("when", when).append_column("l", lists)
    with pa.ipc.new_file(tmp_path / "rows.arrow", table.schema) as writer:
        writer.write_table(table)
    parquet = rows(tmp_path, table, dates=["when"])
    assert rows(tmp_path, train="rows.arrow", dates=["when"]).fingerprint == parquet.fingerprint


def test_numbers_beyond_float32_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1e\+39.*beyond float32"):
        rows(tmp_path, xy([1e39, 1.0, 2.0]))


def test_folders_that_tools_keep_for_themselves_are_left_out(tmp_path: Path) -> None:
    for place in ("d", "d/.ipynb_checkpoints", "d/_log"):
        (tmp_path / place).mkdir()
        pq.write_table(xy([1.0, 2.0]), tmp_path / place / "a.parquet")
    assert len(rows(tmp_path, train="d").train) == 2


def test_a_file_is_not_read_twice(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.validation: .*data\.train has it already"):
        rows(tmp_path, xy([1.0, 2.0]), validation="rows.parquet")


def test_a_name_with_brackets_is_that_file(tmp_path: Path) -> None:
    pq.write_table(xy([1.0, 2.0]), tmp_path / "a[1].parquet")
    pq.write_table(xy([1.0, 2.0, 3.0]), tmp_path / "a1.parquet")
    assert len(rows(tmp_path, train="a[1].parquet").train) == 2


def test_namibia_is_a_country(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('x,n,y\nNA,1,1\nDE,,2\n"",3,3\nnull,4,4\n')
    found = rows(tmp_path, train="rows.csv", missing={"x": "category", "n": "mean"})
    assert found.fields[0].vocabulary == ("DE", "NA", "null")
    assert column(found, "x") == [2, 1, 4, 3]


@pytest.mark.parametrize(
    ("values", "constant", "categorical"),
    [([1, None, 2], 1.5, True), (["a", None], 0, False), ([True, None], "maybe", False),
     ([1, None], "abc", True), ([1, None], "abc", False)],
)  # fmt: skip
def test_a_constant_that_the_column_cannot_hold_is_refused(
    values: Any, constant: Any, categorical: bool, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"data\.missing\.x\.constant"):
        rows(tmp_path, xy(values), missing={"x": {"constant": constant}},
             categorical=["x"] if categorical else [])  # fmt: skip


def test_missing_booleans_can_be_one_of_the_two(tmp_path: Path) -> None:
    found = rows(tmp_path, xy([True, None, False]), missing={"x": {"constant": "true"}})
    assert column(found, "x") == [2, 2, 1]


def test_weights_have_no_mean(tmp_path: Path) -> None:
    table = xy([1.0, None]).append_column("w", pa.array([1.0, 2.0]))
    found = rows(tmp_path, table, missing="mean", sample_weight="w")
    assert column(found, "w") == [1, 2]
    with pytest.raises(DataError, match=r"data\.missing\.w"):
        rows(tmp_path, table, missing={"w": "mean", "x": "mean"}, sample_weight="w")


def test_validation_files_may_have_more_columns(tmp_path: Path) -> None:
    more = xy([5.0]).append_column("z", pa.array([1]))
    pq.write_table(more, tmp_path / "held.parquet")
    found = rows(tmp_path, xy([1.0, 2.0]), validation="held.parquet")
    assert column(found, "x", "validation") == [5]
    pq.write_table(xy([5.0]), tmp_path / "held.parquet")
    with pytest.raises(DataError, match="no column 'z'"):
        rows(tmp_path, more, validation="held.parquet")


def test_types_that_arrow_does_little_with(tmp_path: Path) -> None:
    decimals = xy([Decimal("1.50"), None, Decimal("2.50")], pa.decimal128(9, 2))
    assert column(rows(tmp_path, decimals, missing="mean"), "x") == [1.5, 2.0, 2.5]
    views = pa.array(["b", None, "a"], pa.string_view())
    table = xy([0.0] * 3).append_column("text", views)
    with pa.ipc.new_file(tmp_path / "rows.arrow", table.schema) as writer:
        writer.write_table(table)
    found = rows(tmp_path, train="rows.arrow", missing={"text": "category"})
    assert column(found, "text") == [2, 3, 1]


def test_the_row_of_a_bad_logarithm_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="first at row 3"):
        rows(tmp_path, xy([None, None, 1.0, -3.0]), missing="mean", scale="log")
    with pytest.raises(DataError, match="numbers of -1 or less"):
        rows(tmp_path, xy([[1.0, 2.0], [5.0, -2.0]]), scale="log")


def test_gaps_inside_lists_of_one_size_are_found(tmp_path: Path) -> None:
    kind = pa.list_(pa.list_(pa.float64(), 2), 2)
    table = xy([[[1.0, 2.0], None], [[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]], kind)
    with pa.ipc.new_file(tmp_path / "rows.arrow", table.schema) as writer:  # Parquet has no gaps
        writer.write_table(table)
    with pytest.raises(DataError, match=r"inside a list, in 1 row, first at row 0"):
        rows(tmp_path, train="rows.arrow")
    table = xy([None, [float("inf"), 1.0]], pa.list_(pa.float64(), 2))
    with pa.ipc.new_file(tmp_path / "rows.arrow", table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match="first at row 1"):
        rows(tmp_path, train="rows.arrow", missing="drop")


def test_the_latest_rows_are_as_near_to_the_fraction_as_equal_times_allow(tmp_path: Path) -> None:
    times = pa.array([1] * 10 + [2] * 90 + [3] * 9)
    table = xy([0.0] * 109).append_column("t", times)
    split = {"fraction": 0.1, "time": "t"}
    found = rows(tmp_path, table, inputs=["x"], validation=split)
    assert found.facts.rows == {"train": 100, "validation": 9}


def test_dropped_rows_are_on_no_side(tmp_path: Path) -> None:
    times = pa.array([*range(99), None])
    x = pa.array([1.0] * 55 + [None] * 44 + [1.0])
    table = pa.table({"x": x, "t": times, "y": np.zeros(100)})
    split = {"fraction": 0.4, "time": "t"}
    found = rows(tmp_path, table, inputs=["x"], validation=split, missing="drop")
    assert found.facts.rows == {"train": 33, "validation": 22}


def test_other_rows_with_the_same_size_and_time_are_noticed(tmp_path: Path) -> None:
    first = column(rows(tmp_path, xy([1.0, 2.0, 3.0])), "x")
    path = tmp_path / "rows.parquet"
    before = path.stat()
    pq.write_table(xy([3.0, 2.0, 1.0]), tmp_path / "new.parquet")
    os.utime(tmp_path / "new.parquet", ns=(before.st_atime_ns, before.st_mtime_ns))
    (tmp_path / "new.parquet").replace(path)
    assert path.stat().st_size == before.st_size
    assert column(rows(tmp_path), "x") == first[::-1]


def test_trust_in_an_entry_is_not_renewed_by_trusting_it(tmp_path: Path) -> None:
    rows(tmp_path, xy([1.0, 2.0]))
    (entry,) = [p for p in (tmp_path / "c").iterdir() if not p.name.startswith(".")]
    os.utime(entry / "read", (1.0, 1.0))
    data = Data(train="rows.parquet", target="y", scale="none")
    where = Cache(folder=str(tmp_path / "c"))
    cache.rows(data, tmp_path, {}, np.float32, where, trusted_seconds=1e12)
    assert (entry / "read").stat().st_mtime == 1.0


def test_room_is_not_made_from_what_another_process_uses(tmp_path: Path) -> None:
    rows(tmp_path, xy([1.0, 2.0]))
    (name,) = [p.name for p in (tmp_path / "c").iterdir() if not p.name.startswith(".")]
    left = tmp_path / "c" / f".{name}.4242"
    left.mkdir()
    with (tmp_path / "c" / ".locks" / f"{name}.lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        cache._make_room(tmp_path / "c", 0, "another")
        assert (tmp_path / "c" / name).exists()
        assert left.exists()
    cache._make_room(tmp_path / "c", 0, "another")
    assert not (tmp_path / "c" / name).exists()
    assert not left.exists()


def test_braces_in_names_of_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"{x}": [1.0, None], "y": [0.0, 1.0]}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"'\{x\}' has missing values in 1 row, first at row 1"):
        cache.rows(
            Data(train="rows.parquet", target="y"), tmp_path, {}, np.float32,
            Cache(folder=str(tmp_path / "cache")),
        )  # fmt: skip
