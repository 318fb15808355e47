"""Rows per second of a whole job from Parquet, beside a DDP loop over tensors in memory.

    python -m tests.benchmarks.throughput [PAIRS]

The job: 1 000 000 rows x 32 floats in Parquet, an MLP 64-64, batches of 2048, two Ray workers, the
global loss of every step recorded, MLflow on. The loop: two processes, each with its half of the
rows as tensors, plain DDP and nothing recorded. In turns; both are timed after their first steps.
CPU time is that of the processes that train.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

import pipeline
from tests.processes import on_workers, ray_workers

ROWS, COLUMNS, BATCH, WORKERS, EPOCHS = 1_000_000, 32, 2048, 2, 12
STEPS = EPOCHS * -(-ROWS // BATCH)
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


def ours(folder: Path) -> tuple[float, float]:
    """Rows per second, and CPU microseconds per row, of the job."""
    spec: dict[str, Any] = {
        "name": "throughput", "data": {"train": str(folder / "rows.parquet"), "target": "y"},
        "model": {"name": "mlp", "hidden": [64, 64]}, "loss": "mse",
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "training": {"epochs": EPOCHS, "batch_size": BATCH},
        "workers": {"num": WORKERS}, "storage": str(folder / "runs"),
    }  # fmt: skip
    watch = Watch()
    watch.start()
    result = pipeline.run(spec, fresh=True)
    watch.ended.set()
    assert len(result.losses) == STEPS
    at = {point["step"]: point["time"] / 1000 for point in result.curve if "train" in point}
    start, end = at[FIRST], at[STEPS]
    rows = (STEPS - FIRST) / STEPS * EPOCHS * ROWS
    return rows / (end - start), 1e6 * watch.between(start, end) / rows


def by_hand(rank: int, num: int) -> tuple[float, float]:
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
    for _ in range(EPOCHS):
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
    rows_done = (step - FIRST) / step * EPOCHS * ROWS
    return rows_done / seconds, 1e6 * used / (rows_done / num)


def main(pairs: int) -> None:
    """Print each pair and the medians."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    speeds, costs = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["PIPELINE_CACHE"] = str(folder / "cache")
        write(folder / "rows.parquet")
        for _ in range(pairs):
            (speed, cost), loop = ours(folder), on_workers(WORKERS, by_hand)
            loop_speed = loop[0][0]
            loop_cost = sum(used for _, used in loop) / WORKERS
            speeds.append(speed / loop_speed)
            costs.append(loop_cost / cost)
            print(
                f"job {speed:9,.0f} rows/s, {cost:.2f} us of CPU per row; "
                f"loop {loop_speed:9,.0f}, {loop_cost:.2f}; "
                f"{speeds[-1]:.2f} of its speed, {costs[-1]:.2f} by CPU",
                flush=True,
            )
    print(f"median: {median(speeds):.2f} of the loop's rows/s, {median(costs):.2f} by CPU time")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
