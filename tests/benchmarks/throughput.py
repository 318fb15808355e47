"""Rows per second of a whole job from Parquet, beside a DDP loop over tensors in memory.

The job: 1 000 000 rows x 32 floats in Parquet, an MLP 64-64, batches of 2048, two Ray workers, the
global loss of every step recorded, MLflow on. The loop: two processes, each with its half of the
rows as tensors, plain DDP and nothing recorded. In turns; both are timed after their first steps.
CPU time is that of the processes that train.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

import pipeline
from tests.benchmarks.harness import Result, take_turns
from tests.processes import on_workers, ray_workers

ROUNDS = 5
ROWS, COLUMNS, BATCH, WORKERS, EPOCHS = 1_000_000, 32, 2048, 2, 12
FIRST = 200
"""Steps that are not timed."""


def write(path: Path) -> None:
    """The rows, in ten row groups."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((ROWS, COLUMNS), dtype=np.float32)
    y = np.tanh(x @ generator.standard_normal(COLUMNS, dtype=np.float32))
    columns = {f"x{number}": x[:, number] for number in range(COLUMNS)}
    pq.write_table(pa.table({**columns, "y": y}), path, row_group_size=100_000)


class Watch(threading.Thread):
    """CPU seconds of the processes that train, asked for again and again: `seen` by time."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen: list[tuple[float, float]] = []
        self.ended = threading.Event()

    def run(self) -> None:
        """Until `ended` is set."""
        while not self.ended.wait(0.1):
            used = 0
            for number in ray_workers():
                with contextlib.suppress(OSError):  # it has ended
                    fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
                    used += int(fields[11]) + int(fields[12])  # in user and in system mode
            self.seen.append((time.time(), used / os.sysconf("SC_CLK_TCK")))

    def between(self, start: float, end: float) -> float:
        """CPU seconds from one time to another."""
        times, used = zip(*self.seen, strict=True)
        return float(np.interp(end, times, used) - np.interp(start, times, used))


def ours(folder: Path, epochs: int) -> tuple[float, float]:
    """Rows per second, and CPU microseconds per row, of the job."""
    steps = epochs * -(-ROWS // BATCH)
    spec: dict[str, Any] = {
        "name": "throughput", "data": {"train": str(folder / "rows.parquet"), "target": "y"},
        "model": {"name": "mlp", "hidden": [64, 64]}, "loss": "mse",
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "training": {"epochs": epochs, "batch_size": BATCH},
        "workers": {"num": WORKERS}, "storage": str(folder / "runs"),
    }  # fmt: skip
    watch = Watch()
    watch.start()
    result = pipeline.run(spec, fresh=True)
    watch.ended.set()
    assert len(result.losses) == steps
    at = {point["step"]: point["time"] / 1000 for point in result.curve if "train" in point}
    start, end = at[FIRST], at[steps]
    rows = (steps - FIRST) / steps * epochs * ROWS
    return rows / (end - start), 1e6 * watch.between(start, end) / rows


def by_hand(epochs: int, rank: int, num: int) -> tuple[float, float]:
    """The same of a plain loop, per process."""
    torch.manual_seed(0)
    half = ROWS // num
    x, y = torch.randn(half, COLUMNS), torch.randn(half)
    model = nn.Sequential(
        nn.Linear(COLUMNS, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
    )
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-3)
    step, started = 0, (0.0, 0.0)
    for _ in range(epochs):
        order = torch.randperm(half)
        for rows in torch.split(order, BATCH // num):
            if step == FIRST:
                started = time.perf_counter(), time.process_time()
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(ddp(x[rows]).squeeze(1), y[rows])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            step += 1
    seconds, used = time.perf_counter() - started[0], time.process_time() - started[1]
    rows_done = (step - FIRST) / step * epochs * ROWS
    return rows_done / seconds, 1e6 * used / (rows_done / num)


def results(rounds: int, quick: bool) -> Iterator[Result]:
    """Medians of the job, of the loop, and of their ratios."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    epochs = 2 if quick else EPOCHS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["PIPELINE_CACHE"] = str(folder / "cache")
        write(folder / "rows.parquet")

        def loop() -> tuple[float, float]:
            workers = on_workers(WORKERS, partial(by_hand, epochs))
            return workers[0][0], sum(used for _, used in workers) / WORKERS

        contestants: dict[str, Callable[[], tuple[float, float]]] = {
            "job": partial(ours, folder, epochs), "loop": loop
        }  # fmt: skip
        pairs = take_turns(contestants, rounds)
    both = list(zip(pairs["job"], pairs["loop"], strict=True))
    speeds = [job[0] / other[0] for job, other in both]
    costs = [other[1] / job[1] for job, other in both]
    for case, measured in pairs.items():
        yield {
            "case": case, "rows_per_second": median(m[0] for m in measured),
            "cpu_microseconds_per_row": median(m[1] for m in measured),
        }  # fmt: skip
    yield {"case": "job of loop", "by_time": speeds, "by_cpu": costs}
