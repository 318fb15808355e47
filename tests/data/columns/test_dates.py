"""Columns of dates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.errors import DataError
from tests.data.tables import converted, people, values_of


def test_dates_become_days_elapsed_and_phases_of_cycles(tmp_path: Path) -> None:
    found = people(tmp_path, inputs=["when"], dates=["when"], missing="drop")
    made = values_of(found, "when")
    assert made.shape == (5, 7)
    assert made[:, 0].mean() == pytest.approx(0, abs=1e-6)
    assert made[0, 1:3] == pytest.approx([0.0043, 1.0], abs=1e-3), "the year's first day, at six"
    assert made[0, 5:] == pytest.approx([1, 0], abs=1e-6), "a quarter of the day"
    assert made[1, 5:] == pytest.approx([0, -1], abs=1e-6), "noon"
    parts: Any = {"when": ["week"]}
    week = values_of(people(tmp_path, inputs=["when"], dates=parts, missing="drop"), "when")
    assert week.shape == (5, 2)
    with pytest.raises(DataError, match=r"data\.dates: column 'age'"):
        people(tmp_path, inputs=["age"], dates=["age"], missing="drop")


def test_a_time_that_microseconds_cannot_count_is_an_error(tmp_path: Path) -> None:
    table = pa.table({"t": pa.array([0, 2**45], pa.timestamp("s")), "y": [0.0, 1.0]})
    with pa.ipc.new_file(tmp_path / "rows.arrow", table.schema) as file:
        file.write_table(table)
    with pytest.raises(DataError, match=r"column 't' holds times more than 292,000 years away"):
        converted(tmp_path, train="rows.arrow", dates=["t"])
