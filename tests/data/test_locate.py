"""Which files a spec names."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.errors import DataError
from tests.data.tables import converted, xy


def test_folders_that_tools_keep_for_themselves_are_left_out(tmp_path: Path) -> None:
    for place in ("d", "d/.ipynb_checkpoints", "d/_log"):
        (tmp_path / place).mkdir()
        pq.write_table(xy([1.0, 2.0]), tmp_path / place / "a.parquet")
    assert len(converted(tmp_path, train="d").train) == 2


def test_a_file_is_not_read_twice(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.validation: .*data\.train has it already"):
        converted(tmp_path, xy([1.0, 2.0]), validation="rows.parquet")


def test_a_name_with_brackets_is_that_file(tmp_path: Path) -> None:
    pq.write_table(xy([1.0, 2.0]), tmp_path / "a[1].parquet")
    pq.write_table(xy([1.0, 2.0, 3.0]), tmp_path / "a1.parquet")
    assert len(converted(tmp_path, train="a[1].parquet").train) == 2


def test_files_of_several_formats_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    pq.write_table(xy([1.0]), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"several formats: .*a\.csv, .*b\.parquet"):
        converted(tmp_path, train=["*"])
    (tmp_path / "c.txt").write_text("x")
    with pytest.raises(DataError, match=r"expected files that end in .*\.csv.*found .*c\.txt"):
        converted(tmp_path, train=["*"])
