"""Rows per second of a job while MLflow's server is well, and while it is not.

500 000 rows x 32 floats, an MLP 64-64, batches of 2048, two Ray workers, the loss of every step
recorded. A real server stands behind a proxy that lets all requests fail, or wait, or lose their
answer, from the first to the last step; the record is completed afterwards. In turns; timed after
the first steps.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import pipeline
from tests import mlflow_server
from tests.benchmarks.harness import Result, take_turns
from tests.chaos import proxy

ROUNDS = 5
ROWS, COLUMNS, BATCH, WORKERS = 500_000, 32, 2048, 2
FIRST = 200
"""Steps that are not timed."""
MODES = ("well", "down", "slow", "failing", "lost")


def write(path: Path) -> None:
    generator = np.random.default_rng(0)
    x = generator.standard_normal((ROWS, COLUMNS), dtype=np.float32)
    columns: dict[str, Any] = {f"x{number}": x[:, number] for number in range(COLUMNS)}
    pq.write_table(pa.table({**columns, "y": np.tanh(x[:, 0])}), path)


def speed(folder: Path, server: mlflow_server.Server, mode: str, quick: bool) -> float:
    """Rows per second of the job."""
    epochs = 2 if quick else 16
    steps = epochs * -(-ROWS // BATCH)
    spec: dict[str, Any] = {
        "name": "outages", "data": {"train": str(folder / "rows.parquet"), "target": "y"},
        "model": {"name": "mlp", "hidden": [64, 64]}, "loss": "mse",
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "training": {"epochs": epochs, "batch_size": BATCH},
        "workers": {"num": WORKERS}, "storage": str(folder / "runs"),
    }  # fmt: skip

    def fault(method: str, path: str) -> str | None:
        (newest,) = sorted((folder / "runs").glob("outages-*"), key=os.path.getmtime)[-1:]
        return None if mode == "well" or (newest / "ended.json").exists() else mode

    with ExitStack() as held:
        address = held.enter_context(proxy.in_front_of(server, fault))
        held.enter_context(patch.dict(os.environ, {"MLFLOW_TRACKING_URI": address}))
        result = pipeline.run(spec, fresh=True)
    at = {point["step"]: point["time"] / 1000 for point in result.curve if "train" in point}
    return (steps - FIRST) / steps * epochs * ROWS / float(at[steps] - at[FIRST])


def results(rounds: int, quick: bool) -> Iterator[Result]:
    """Speed in each mode, and its ratio to that beside a server that is well."""
    modes = MODES[:2] if quick else MODES
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["PIPELINE_CACHE"] = str(folder / "cache")
        write(folder / "rows.parquet")
        (folder / "mlflow").mkdir()
        with mlflow_server.running(folder / "mlflow") as server:
            contestants = {mode: partial(speed, folder, server, mode, quick) for mode in modes}
            speeds = take_turns(contestants, rounds)
    for mode in modes:
        ratios = [one / well for one, well in zip(speeds[mode], speeds["well"], strict=True)]
        yield {
            "case": mode, "rows_per_second": median(speeds[mode]), "of_well": median(ratios),
            "rounds": rounds,
        }  # fmt: skip
