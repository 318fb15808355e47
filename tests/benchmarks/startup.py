"""Seconds from command to first step: ours on one and two workers, and a bare `TorchTrainer`.

The bare script is the smallest one with two workers, DDP and Ray's default settings. The three
take turns, so that whatever else the machine does meets all of them alike.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

from tests.benchmarks.harness import Result, take_turns

BARE = """
import os, sys, time
import ray.train, ray.train.torch, torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

def work(config):
    model = ray.train.torch.prepare_model(torch.nn.Linear(1, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x = torch.tensor([[1.0], [2.0], [3.0]])
    loss = ((model(x) - 2 * x) ** 2).mean()
    loss.backward()
    optimizer.step()
    if ray.train.get_context().get_world_rank() == 0:
        open(config["path"], "w").write(str(time.time()))

path = sys.argv[1]
TorchTrainer(
    work, train_loop_config={"path": path}, scaling_config=ScalingConfig(num_workers=2),
    run_config=RunConfig(storage_path=os.path.dirname(path)),
).fit()
"""
ROUNDS = 3
JOB = Path(__file__).parents[2] / "jobs" / "linear.yaml"


def ours(num_workers: int, folder: Path) -> float:
    """Seconds until the journal's first step."""
    command = [
        sys.executable, "-m", "pipeline", "run", str(JOB), "--json",
        "--fresh", "--set", f"workers.num={num_workers}", "--set", f"storage={folder}",
    ]  # fmt: skip
    started = time.time()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    journal = (Path(result["storage"]) / "curve.jsonl").read_text().splitlines()
    first = next(point for point in map(json.loads, journal) if "train" in point)
    return float(first["time"] / 1000 - started)


def bare(folder: Path) -> float:
    """Seconds until the bare script's first step."""
    script, stamp = folder / "bare.py", folder / "first_step"
    script.write_text(BARE)
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    started = time.time()
    subprocess.run(
        [sys.executable, str(script), str(stamp)], capture_output=True, check=True, env=environment
    )
    return float(stamp.read_text()) - started


def results(rounds: int, quick: bool) -> Iterator[Result]:
    """Median seconds of each, and their ratio to the bare script's."""

    def in_folder(measure: Callable[[Path], float]) -> float:
        with tempfile.TemporaryDirectory() as name:
            return measure(Path(name))

    seconds = take_turns(
        {
            "workers.num=1": partial(in_folder, partial(ours, 1)),
            "workers.num=2": partial(in_folder, partial(ours, 2)),
            "bare two-worker TorchTrainer": partial(in_folder, bare),
        },
        rounds,
    )
    base = median(seconds["bare two-worker TorchTrainer"])
    for name, values in seconds.items():
        yield {"case": name, "seconds": median(values), "of_bare": median(values) / base}
