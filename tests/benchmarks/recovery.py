"""What checkpoints cost, and how long a killed worker holds a run up.

    python -m tests.benchmarks.recovery

Checkpoints: for a small model and one of 50 million parameters, the milliseconds for which `save`
keeps the step waiting (the copy), those that the thread then writes beside it, and the copy as a
share of a step's time. Recovery: three Ray workers of which one is killed; seconds from the last
step before to the first new one after, and steps computed again.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

import pipeline
from pipeline.launch import cluster
from pipeline.spec import Checkpoint
from pipeline.train import checkpoint
from tests.conftest import JOBS

ROUNDS = 5
SIZES = {"small: 32-64-64-1": (64, 512), "50 M: 32-7000-7000-1": (7000, 512)}


def stall(width: int, batch_size: int) -> tuple[float, float, float]:
    """Medians in seconds: of a step, of the wait for a copy, of writing it."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(32, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
    )
    optimizer = torch.optim.AdamW(model.parameters())
    steps, waits, writes = [], [], []
    with tempfile.TemporaryDirectory() as place:
        identity = {"spec": "", "data": "", "bits": {}}
        checkpoints = checkpoint.Checkpoints(Path(place), Checkpoint(keep=2), identity)
        for step in range(ROUNDS):
            started = time.perf_counter()
            optimizer.zero_grad()
            model(torch.randn(batch_size, 32)).square().mean().backward()
            optimizer.step()
            done = time.perf_counter()
            state = checkpoint.state_of(model, optimizer)
            checkpoints.save(step, state, lambda: None)
            copied = time.perf_counter()
            checkpoints.wait()
            steps.append(done - started)
            waits.append(copied - done)
            writes.append(time.perf_counter() - copied)
    return median(steps), median(waits), median(writes)


def recovery() -> tuple[float, int]:
    """Seconds without a new step, and steps computed again, after the death of a worker."""
    fit = cluster.fit

    def with_a_kill(spec: Any, config: dict[str, Any], name: str) -> None:
        fit(spec, config | {"faults": [(1, 55)]}, name)

    with patch.object(cluster, "fit", with_a_kill), tempfile.TemporaryDirectory() as place:
        overrides = {
            "workers.num": 3, "training.microbatch_size": 1, "checkpoint.every_steps": 10,
            "storage": place,
        }  # fmt: skip
        result = pipeline.run(JOBS / "linear.yaml", overrides)
    train = {point["step"]: point["time"] for point in result.curve if "train" in point}
    (again,) = [p for p in result.curve if p.get("event") == "start" and p["step"]]
    before = max(step for step, at in train.items() if at < again["time"])
    return (train[before + 1] - train[before]) / 1000, before - again["step"]


def main() -> None:
    """Print a line for each."""
    for name, (width, batch_size) in SIZES.items():
        step, wait, write = stall(width, batch_size)
        print(
            f"{name:22} step {1000 * step:.1f} ms, copy {1000 * wait:.1f} ms "
            f"({wait / step:.2f} of a step), written beside it in {1000 * write:.0f} ms"
        )
    seconds, steps = recovery()
    print(f"a killed worker of three: {seconds:.1f} s to the next new step, {steps} steps again")


if __name__ == "__main__":
    main()
