"""Rows per second of a job while MLflow's server is well, and while it is not.

    python -m tests.benchmarks.outages [ROUNDS]

500 000 rows x 32 floats, an MLP 64-64, batches of 2048, two Ray workers, the loss of every step
recorded. A real server stands behind a proxy that lets all requests fail, or wait, or lose their
answer, from the first to the last step; the record is completed afterwards. In turns; timed after
the first steps.
"""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import pipeline
from tests import tracking
from tests.chaos import proxy

ROWS, COLUMNS, BATCH, WORKERS, EPOCHS = 500_000, 32, 2048, 2, 16
STEPS = EPOCHS * -(-ROWS // BATCH)
FIRST = 200
"""Steps that are not timed."""
MODES = ("well", "down", "slow", "failing", "lost")


def write(path: Path) -> None:
    generator = np.random.default_rng(0)
    x = generator.standard_normal((ROWS, COLUMNS), dtype=np.float32)
    columns: dict[str, Any] = {f"x{number}": x[:, number] for number in range(COLUMNS)}
    pq.write_table(pa.table({**columns, "y": np.tanh(x[:, 0])}), path)


def speed(folder: Path, server: tracking.Server, mode: str) -> float:
    """Rows per second of the job."""
    spec: dict[str, Any] = {
        "name": "outages", "data": {"train": str(folder / "rows.parquet"), "target": "y"},
        "model": {"name": "mlp", "hidden": [64, 64]}, "loss": "mse",
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "training": {"epochs": EPOCHS, "batch_size": BATCH},
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
    return (STEPS - FIRST) / STEPS * EPOCHS * ROWS / float(at[STEPS] - at[FIRST])


def main(rounds: int) -> None:
    """Print each round, and the medians as shares of the speed beside a server that is well."""
    shares: dict[str, list[float]] = {mode: [] for mode in MODES[1:]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["PIPELINE_CACHE"] = str(folder / "cache")
        write(folder / "rows.parquet")
        (folder / "mlflow").mkdir()
        with tracking.running(folder / "mlflow") as server:
            for _ in range(rounds):
                found = {mode: speed(folder, server, mode) for mode in MODES}
                print(", ".join(f"{mode} {v:,.0f} rows/s" for mode, v in found.items()), flush=True)
                for mode, values in shares.items():
                    values.append(found[mode] / found["well"])
    said = ", ".join(f"{mode} {median(values):.2f}" for mode, values in shares.items())
    print(f"median share of the speed beside a server that is well: {said}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
