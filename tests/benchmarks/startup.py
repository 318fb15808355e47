"""Seconds from command to first step: ours on one and two workers, and a bare `TorchTrainer`.

    python -m tests.benchmarks.startup [ROUNDS]

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
from pathlib import Path
from statistics import median

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


def main(rounds: int) -> None:
    """Print each round and the medians."""
    found: dict[str, list[float]] = {"one worker": [], "two workers": [], "bare, two workers": []}
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            found["one worker"].append(ours(1, folder))
            found["two workers"].append(ours(2, folder))
            found["bare, two workers"].append(bare(folder))
        shown = ", ".join(f"{name} {values[-1]:.1f} s" for name, values in found.items())
        print(f"round {number + 1}: {shown}", flush=True)
    base = median(found["bare, two workers"])
    for name, values in found.items():
        print(f"{name:20} {median(values):5.1f} s  {median(values) / base:.2f} of bare")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
