"""The fingerprint of rows: of their values, whatever the files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from tests.data.tables import converted, xy


def test_missing_is_not_zero_to_the_fingerprint(tmp_path: Path) -> None:
    one = converted(tmp_path, xy([1.0, 2, None, 3, None, None, 4, None]), missing="mean")
    other = converted(tmp_path, xy([1.0, 2, 0, 3, 0, 0, 4, 0]), missing="mean")
    assert one.fingerprint != other.fingerprint


def test_the_fingerprint_is_that_of_the_rows_not_of_the_format(tmp_path: Path) -> None:
    when = pa.array(np.arange(5).astype("M8[s]"))
    lists = pa.array([[1], [2, 3], [], [4], [5]])
    table = xy([1.0] * 5).append_column("when", when).append_column("l", lists)
    with pa.ipc.new_file(tmp_path / "rows.arrow", table.schema) as writer:
        writer.write_table(table)
    parquet = converted(tmp_path, table, dates=["when"])
    assert (
        converted(tmp_path, train="rows.arrow", dates=["when"]).fingerprint == parquet.fingerprint
    )
