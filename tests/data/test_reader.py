"""Blocks of rows out of files: names of rows, columns of several files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data import cache
from pipeline.errors import DataError
from pipeline.spec import Cache
from pipeline.spec.data import Data
from tests.data.tables import converted, list_of, xy


def test_the_file_of_a_bad_row_is_named(tmp_path: Path) -> None:
    for name, x in (("a", [1.0, 2.0]), ("b", [3.0, None])):
        pq.write_table(pa.table({"x": x, "y": [1.0, 2.0]}), tmp_path / f"{name}.parquet")
    data = Data(train="*.parquet", target="y")
    with pytest.raises(DataError, match=r"first at row 1 of .*b\.parquet"):
        cache.load_or_convert(data, tmp_path, {}, np.float32, Cache())


def test_validation_files_may_have_more_columns(tmp_path: Path) -> None:
    more = xy([5.0]).append_column("z", pa.array([1]))
    pq.write_table(more, tmp_path / "held.parquet")
    found = converted(tmp_path, xy([1.0, 2.0]), validation="held.parquet")
    assert list_of(found, "x", "validation") == [5]
    pq.write_table(xy([5.0]), tmp_path / "held.parquet")
    with pytest.raises(DataError, match="no column 'z'"):
        converted(tmp_path, more, validation="held.parquet")


def test_braces_in_names_of_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"{x}": [1.0, None], "y": [0.0, 1.0]}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"'\{x\}' has missing values in 1 row, first at row 1"):
        cache.load_or_convert(
            Data(train="rows.parquet", target="y"), tmp_path, {}, np.float32,
            Cache(folder=str(tmp_path / "cache")),
        )  # fmt: skip


def test_a_name_that_is_in_no_file_is_not_suggested(tmp_path: Path) -> None:
    table = xy([1.0]).append_column("city", pa.array(["a"]))
    with pytest.raises(DataError) as caught:
        converted(tmp_path, table, inputs=["x", "citty"], missing={"city": "drop"})
    assert "no column 'citty' in" in str(caught.value)
    assert "did you mean 'city'?" in str(caught.value)
    assert "did you mean 'citty'?" not in str(caught.value)


def test_amounts_that_are_read_as_classes_come_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"text; leave it out of data\.categorical"):
        converted(tmp_path, xy([1.5, 2.5]), categorical=["x"])
