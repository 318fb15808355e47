"""What checkpoints cost, and how long a killed worker holds a run up.

Checkpoints: for a small model and one of 50 million parameters, the milliseconds for which `save`
keeps the step waiting (the copy), those that the thread then writes beside it, and the copy as a
share of a step's time. Recovery: three Ray workers of which one is killed; seconds from the last
step before to the first new one after, and steps recomputed. Goodput: three workers for some
minutes, of which one is killed every 60 seconds; the share of the time that went into steps that
count, of the length that steps of this run have.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

import pipeline
from pipeline.launch import ray_trainer
from pipeline.rundir import RunDir, checkpoint
from pipeline.rundir.records import Identity
from pipeline.spec import Checkpoint
from pipeline.train.assignment import Assignment
from pipeline.train.state import TrainState
from tests.benchmarks.harness import Result
from tests.conftest import JOBS
from tests.processes import ray_workers

ROUNDS = 5
KILL_SECONDS = 60.0
SIZES = {"small: 32-64-64-1": (64, 512), "50 M: 32-7000-7000-1": (7000, 512)}


def stall(width: int, batch_size: int, rounds: int) -> tuple[float, float, float]:
    """Medians in seconds: of a step, of the wait for a copy, of writing it."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(32, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
    )
    optimizer = torch.optim.AdamW(model.parameters())
    state = TrainState(model, optimizer, None)  # type: ignore[arg-type]
    steps, waits, writes = [], [], []
    with tempfile.TemporaryDirectory() as place:
        identity = Identity(spec="", data="", bits={})
        run = RunDir(Path(place))
        run.checkpoints.mkdir()
        checkpoints = checkpoint.Checkpoints(run, Checkpoint(keep=2), identity)
        for step in range(rounds):
            started = time.perf_counter()
            optimizer.zero_grad()
            model(torch.randn(batch_size, 32)).square().mean().backward()
            optimizer.step()
            done = time.perf_counter()
            checkpoints.save(step, state.snapshot(), lambda: None)
            copied = time.perf_counter()
            checkpoints.wait()
            steps.append(done - started)
            waits.append(copied - done)
            writes.append(time.perf_counter() - copied)
    return median(steps), median(waits), median(writes)


def recovery() -> tuple[float, int]:
    """Seconds without a new step, and steps recomputed, after the death of a worker."""
    fit = ray_trainer.fit

    def with_a_kill(told: Assignment, **rest: Any) -> None:
        fit(replace(told, faults=[(1, 55)]), **rest)

    with patch.object(ray_trainer, "fit", with_a_kill), tempfile.TemporaryDirectory() as place:
        overrides = {
            "workers.num": 3, "training.microbatch_size": 1, "checkpoint.every_steps": 10,
            "storage": place,
        }  # fmt: skip
        result = pipeline.run(JOBS / "linear.yaml", overrides)
    train = {point["step"]: point["time"] for point in result.curve if "train" in point}
    starts = [p for p in result.curve if "event" in p and p["event"] == "start"]
    (again,) = [start for start in starts if start["step"]]
    before = max(step for step, at in train.items() if at < again["time"])
    return (train[before + 1] - train[before]) / 1000, before - again["step"]


class Killer(threading.Thread):
    """Kills one of the Ray workers every `KILL_SECONDS`, from the first step on."""

    def __init__(self, curve: Path) -> None:
        super().__init__(daemon=True)
        self.curve, self.ended, self.kills = curve, threading.Event(), 0

    def run(self) -> None:
        """Until `ended` is set."""
        while not self.curve.exists() and not self.ended.wait(0.1):
            pass
        while not self.ended.wait(KILL_SECONDS):
            os.kill(random.choice(ray_workers()), signal.SIGKILL)
            self.kills += 1


def goodput() -> tuple[float, int, float, float]:
    """Share of the time, number of kills, steps recomputed by each, and seconds in all."""
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        columns = {f"x{i}": generator.standard_normal(24_000) for i in range(8)}
        pq.write_table(pa.table(columns), folder / "rows.parquet")
        spec: dict[str, Any] = {
            "name": "goodput", "data": {"train": str(folder / "rows.parquet"), "target": "x7"},
            "model": {"name": "mlp", "hidden": [1500, 1500]}, "loss": "mse",
            "optimizer": {"name": "adamw", "lr": 1e-4}, "checkpoint": {"every_seconds": 5},
            "training": {"epochs": 80, "batch_size": 384, "microbatch_size": 128},
            "workers": {"num": 3}, "storage": str(folder / "runs"),
        }  # fmt: skip
        killer = Killer(folder / "runs" / "goodput-1" / "curve.jsonl")
        killer.start()
        result = pipeline.run(spec)
        killer.ended.set()
    times = [point["time"] / 1000 for point in result.curve if "train" in point]
    typical = median(after - before for before, after in pairwise(times))
    starts = [p for p in result.curve if "event" in p and p["event"] == "start"]
    assert len(starts) == killer.kills + 1, "each kill was seen"
    again = sum(max(0, start["reached"] - start["step"]) for start in starts)
    wall = times[-1] - times[0]
    return typical * (len(times) - 1) / wall, killer.kills, again / max(killer.kills, 1), wall


def results(rounds: int, quick: bool) -> Iterator[Result]:
    """Checkpoints by size, the death of one worker, and one every minute."""
    for name, (width, batch_size) in list(SIZES.items())[: 1 if quick else None]:
        step, wait, write = stall(width, batch_size, rounds)
        yield {
            "case": f"checkpoint, {name}", "step_seconds": step, "copy_seconds": wait,
            "copy_of_step": wait / step, "write_seconds": write,
        }  # fmt: skip
    seconds, steps = recovery()
    yield {"case": "one of three workers killed", "seconds": seconds, "recomputed_steps": steps}
    if quick:
        return
    ratio, kills, recomputed, wall = goodput()
    yield {
        "case": f"one killed every {KILL_SECONDS:.0f} s", "goodput": ratio, "kills": kills,
        "recomputed_steps": recomputed, "seconds": wall,
    }  # fmt: skip
