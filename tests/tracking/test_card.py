"""A model's description: ranges and values as the training rows have them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.rundir import RunDir
from pipeline.rundir.records import Record, Scores
from pipeline.tracking.card import MAX_COLUMNS, card
from pipeline.tracking.record import write_record
from tests.data.tables import job_of

NUM_ROWS = 60


def record_of(folder: Path, frame: pd.DataFrame) -> Record:
    frame.to_parquet(folder / "rows.parquet")
    data = {"validation": 0.3, "missing": {"b|c": "category"}}
    job = job_of(folder, "rows.parquet", data=data)
    run = RunDir(folder / "run")
    run.path.mkdir()
    write_record(run, job, [])
    return Record.read(run.record)


def test_it_has_ranges_vocabularies_metrics_and_limits(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = np.array(["x", "y|z", "w", None], dtype=object)[rng.integers(0, 4, NUM_ROWS)]
    frame = pd.DataFrame({"a": rng.normal(size=NUM_ROWS), "b|c": names, "y": rng.normal(size=60)})
    record = record_of(tmp_path, frame)
    validation = Scores(metrics={"loss": 0.5, "r2": 0.25}, baselines={"r2": -0.01})
    test = Scores(metrics={"r2": 0.125}, baselines={})
    text = card(record, 7, {"validation": validation, "test": test}, ["y"])
    profile = record.data.profile["a"]
    assert f"| a | double | {profile['min']:.6g} to {profile['max']:.6g} |" in text
    assert "| b\\|c | large_string, may be missing | w, x, y\\|z |" in text
    assert "| r2 | 0.25 | -0.01 |" in text
    assert "| loss | 0.5 |  |" in text
    assert text.index("| test |") < text.index("| r2 | 0.125 |  |")
    assert "for 7 steps" in text
    assert "all read as one: unknown" in text


def test_of_many_columns_the_first_are_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({f"c{i}": rng.normal(size=NUM_ROWS) for i in range(MAX_COLUMNS + 7)})
    record = record_of(tmp_path, frame.assign(y=1.0 * frame["c0"], **{"b|c": "k"}))
    text = card(record, 1, {"validation": Scores(metrics={}, baselines={}), "test": None}, ["y"])
    assert "| 8 more | | |" in text
    assert "There were no validation rows" in text
    assert "| test |" not in text
