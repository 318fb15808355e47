"""Where a validation row stands in its file: the row that a reader of the file finds there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.data.tables import job_of

RNG = np.random.default_rng(3)
SIZES = [30, 1, 50, 20]


@pytest.fixture
def frames(tmp_path: Path) -> list[pd.DataFrame]:
    made = []
    for index, size in enumerate(SIZES):
        x = RNG.normal(size=size)
        x[size // 3] = np.nan  # which is dropped
        frame = pd.DataFrame({"x": x, "y": RNG.normal(size=size), "day": RNG.integers(0, 9, size)})
        frame.to_parquet(tmp_path / f"part-{index}.parquet", row_group_size=7)
        frame.to_csv(tmp_path / f"part-{index}.csv", index=False)
        made.append(frame)
    return made


@pytest.mark.parametrize("ending", ["parquet", "csv"])
@pytest.mark.parametrize(
    "validation", [0.3, {"group": "day", "fraction": 0.4}, {"time": "day", "fraction": 0.3}]
)
def test_each_row_is_found_in_its_file(
    frames: list[pd.DataFrame], tmp_path: Path, ending: str, validation: Any
) -> None:
    data = {
        "train": f"*.{ending}", "inputs": ["x"], "missing": "drop", "validation": validation,
        "scale": "none",
    }  # fmt: skip
    job = job_of(tmp_path, "unused", data=data)
    assert job.validation is not None
    assert job.origins is not None
    held_out = job.validation.gather(np.arange(job.num_validation_rows))
    assert len(job.origins.index) == job.num_validation_rows > 10
    for row in range(job.num_validation_rows):
        path, index = job.origins.find(row)
        frame = frames[int(Path(path).stem.removeprefix("part-"))]
        assert held_out["x"][row] == np.float32(frame["x"][index])  # type: ignore[index]


def test_of_a_file_of_its_own_too(frames: list[pd.DataFrame], tmp_path: Path) -> None:
    held_out = str(tmp_path / "part-2.csv")
    data = {"inputs": ["x"], "missing": "drop", "validation": held_out}
    job = job_of(tmp_path, "part-0.csv", data=data)
    assert job.origins is not None
    assert [job.origins.find(row) for row in (0, 30)] == [(held_out, 0), (held_out, 31)]
