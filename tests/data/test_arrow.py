"""Arrow types and values that are not what they seem."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.errors import DataError
from tests.data.tables import converted, list_of, xy


def test_types_that_arrow_does_little_with(tmp_path: Path) -> None:
    decimals = xy([Decimal("1.50"), None, Decimal("2.50")], pa.decimal128(9, 2))
    assert list_of(converted(tmp_path, decimals, missing="mean"), "x") == [1.5, 2.0, 2.5]
    views = pa.array(["b", None, "a"], pa.string_view())
    table = xy([0.0] * 3).append_column("text", views)
    with pa.ipc.new_file(tmp_path / "rows.arrow", table.schema) as writer:
        writer.write_table(table)
    found = converted(tmp_path, train="rows.arrow", missing={"text": "category"})
    assert list_of(found, "text") == [2, 3, 1]


def test_gaps_inside_lists_of_one_size_are_found(tmp_path: Path) -> None:
    kind = pa.list_(pa.list_(pa.float64(), 2), 2)
    table = xy([[[1.0, 2.0], None], [[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]], kind)
    with pa.ipc.new_file(tmp_path / "rows.arrow", table.schema) as writer:  # Parquet has no gaps
        writer.write_table(table)
    with pytest.raises(DataError, match=r"inside a list, in 1 row, first at row 0"):
        converted(tmp_path, train="rows.arrow")
    table = xy([None, [float("inf"), 1.0]], pa.list_(pa.float64(), 2))
    with pa.ipc.new_file(tmp_path / "rows.arrow", table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match="first at row 1"):
        converted(tmp_path, train="rows.arrow", missing="drop")


def test_namibia_is_a_country(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('x,n,y\nNA,1,1\nDE,,2\n"",3,3\nnull,4,4\n')
    found = converted(tmp_path, train="rows.csv", missing={"x": "category", "n": "mean"})
    assert found.fields[0].vocabulary == ("DE", "NA", "null")
    assert list_of(found, "x") == [2, 1, 4, 3]
