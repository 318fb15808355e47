"""Files of every format, in any layout: the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data import cache
from pipeline.spec.data import Data
from tests.data.tables import MIXED, read, write


@pytest.mark.parametrize("name", ["r.parquet", "r.arrow", "r.feather", "r.csv"])
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    table = MIXED.select(["amount", "count", "color", "y"])
    write(tmp_path, table, name)
    found = read(Data(train=name, target="y", scale="none"), tmp_path)
    assert [field.name for field in found.fields] == ["amount", "count", "color", "y"]
    batch: Any = found.train.gather(np.arange(4))
    assert batch["amount"].tolist() == table["amount"].to_pylist()
    assert batch["color"].tolist() == [3, 1, 3, 2]
    assert found.example.to_pylist() == table.drop_columns("y").to_pylist()


def test_the_layout_of_files_changes_neither_rows_nor_fingerprint(tmp_path: Path) -> None:
    table = MIXED.select(["amount", "y"])
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    write(tmp_path, table, "one/all.parquet")
    write(tmp_path, table.slice(0, 1), "two/a.parquet")
    write(tmp_path, table.slice(1), "two/b.parquet")
    write(tmp_path, table.slice(0, 3), "three.parquet")

    def rows(train: str | list[str]) -> cache.ConvertedRows:
        return read(Data(train=train, target="y"), tmp_path)

    found = [rows(t) for t in ("one", "two", "two/*.parquet", ["two/a.parquet", "two/b.parquet"])]
    found.append(rows((tmp_path / "two").as_uri()))
    assert len({one.fingerprint for one in found}) == 1
    assert all((one.train.records == found[0].train.records).all() for one in found)
    assert rows("three.parquet").fingerprint != found[0].fingerprint
