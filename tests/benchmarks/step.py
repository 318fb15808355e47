"""What a step costs beyond a loop written by hand, where it is small: microseconds, by workers.

12 floats, batches of 1024, an MLP 64-64, AdamW, in one and in two gloo processes. The step is all
of it: rows from the cache, losses and norm, the journal's line; without Ray and MLflow. The loop:
DDP over tensors in memory, nothing recorded. In turns, and both timed after their first steps.
"""

from __future__ import annotations

import os
import tempfile
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

from pipeline.rundir import RunDir
from pipeline.spec import load
from pipeline.train.job import prepare
from pipeline.train.loop import train
from tests.benchmarks.harness import Result, take_turns
from tests.processes import on_workers

ROUNDS = 5
ROWS, COLUMNS, BATCH = 102_400, 12, 1024
FIRST = 200
"""Steps that are not timed."""


def ours(tree: dict[str, Any], folder: Path, rank: int, num: int) -> float:
    """Seconds of a step of a job."""
    times: dict[int, float] = {}
    job = prepare(load(tree), folder)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        run = RunDir(folder / f"run-{num}" if rank else Path(name))
        run.path.mkdir(exist_ok=True)
        train(job, run, lambda step: times.update({step: time.perf_counter()}))
    last = max(times)
    return (times[last] - times[FIRST]) / (last - FIRST)


def by_hand(steps: int, rank: int, num: int) -> float:
    """The same of a plain loop."""
    torch.manual_seed(0)
    x, y = torch.randn(ROWS // num, COLUMNS), torch.randn(ROWS // num)
    model: nn.Module = nn.Sequential(
        nn.Linear(COLUMNS, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
    )
    if num > 1:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches: list[torch.Tensor] = []
    started = 0.0
    for step in range(steps):
        if step == FIRST:
            started = time.perf_counter()
        batches = batches or list(torch.split(torch.randperm(len(y)), BATCH // num))
        rows = batches.pop()
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x[rows]).squeeze(1), y[rows])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return (time.perf_counter() - started) / (steps - FIRST)


def slowest(num: int, work: Callable[[int, int], float]) -> float:
    """Seconds of a step of the worker that takes most."""
    return float(max(on_workers(num, work)))


def results(rounds: int, quick: bool) -> Iterator[Result]:
    """Medians of a step of both, and of what ours costs more."""
    epochs = 3 if quick else 20
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["PIPELINE_CACHE"] = str(folder / "cache")
        generator = np.random.default_rng(0)
        x = generator.standard_normal((ROWS, COLUMNS), dtype=np.float32)
        columns = {f"x{number}": x[:, number] for number in range(COLUMNS)}
        pq.write_table(pa.table({**columns, "y": np.tanh(x.sum(1))}), folder / "rows.parquet")
        tree: dict[str, Any] = {
            "name": "step", "data": {"train": str(folder / "rows.parquet"), "target": "y"},
            "model": {"name": "mlp", "hidden": [64, 64]}, "loss": "mse",
            "optimizer": {"name": "adamw", "lr": 1e-3},
            "training": {"epochs": epochs, "batch_size": BATCH},
        }  # fmt: skip
        cut = tree | {"training": tree["training"] | {"microbatch_size": BATCH // 4}}
        steps = epochs * ROWS // BATCH
        for num in (1, 2):
            works = {
                "loop": partial(by_hand, steps),
                "job": partial(ours, tree, folder),
                "job, 4 micro-batches": partial(ours, cut, folder),
            }
            contestants = {case: partial(slowest, num, work) for case, work in works.items()}
            measured = take_turns(contestants, rounds)
            for case, seconds in measured.items():
                more = [s - loop for s, loop in zip(seconds, measured["loop"], strict=True)]
                yield {
                    "case": case, "workers": num,
                    "microseconds_per_step": 1e6 * median(seconds),
                    "beyond_the_loop": 1e6 * median(more),
                }  # fmt: skip
