"""`pipeline predict`: rows a second and peak memory, on files of one length and of ten times that.

A small perceptron over six numbers and a category, in Parquet files of a million rows, by the
command itself in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import pipeline
from tests.benchmarks.harness import Result

ROUNDS = 1
MEASURED = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
"""
"""Runs a command, and prints the peak memory of its largest process, in MiB."""
NUM_ROWS, FILE_ROWS = 10_000_000, 1_000_000


def results(rounds: int, quick: bool) -> Iterator[Result]:
    """One million rows, then ten, each on one worker and on two."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _rows(5000, folder / "train.parquet", with_target=True)
        trained = pipeline.run({
            "name": "predicted", "model": {"name": "mlp", "hidden": [64]}, "loss": "mse",
            "data": {"train": str(folder / "train.parquet"), "target": "y",
                     "inputs": [*(f"x{i}" for i in range(6)), "city"]},
            "training": {"epochs": 1}, "storage": str(folder / "runs"),
        })  # fmt: skip
        largest = 20_000 if quick else NUM_ROWS
        for number in (largest // 10, largest):
            files = folder / f"files-{number}"
            files.mkdir()
            for index in range(max(number // FILE_ROWS, 1)):
                _rows(min(number, FILE_ROWS), files / f"{index}.parquet")
            for workers in (1, 2):
                for _ in range(rounds):
                    yield _measured(trained.storage, files, workers)


def _rows(number: int, path: Path, with_target: bool = False) -> None:
    rng = np.random.default_rng(number)
    columns = {f"x{i}": rng.normal(size=number).astype(np.float32) for i in range(6)}
    target = {"y": columns["x0"] - columns["x1"]} if with_target else {}
    city = rng.choice(["ulm", "bern", "graz"], number)
    pq.write_table(pa.table({"id": np.arange(number), **columns, "city": city, **target}), path)


def _measured(model: str, files: Path, workers: int) -> Result:
    started = time.perf_counter()
    answer = subprocess.run(
        [sys.executable, "-c", MEASURED, sys.executable, "-m", "pipeline", "predict", model,
         str(files), "--json", "--fresh",
         "--out", str(files.parent / "out"), "--workers", str(workers)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    said, peak_mib = map(json.loads, answer.stdout.splitlines())
    return {
        "case": f"{said['rows']:,} rows, {workers} worker{'s' if workers > 1 else ''}",
        "rows_per_second": said["rows"] / said["seconds"],
        "seconds_of_the_command": time.perf_counter() - started,
        "peak_mib_of_a_process": peak_mib,
    }
