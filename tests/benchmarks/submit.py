"""Seconds from command to first step on a running head: `pipeline submit`, and a bare script.

The bare script is that of `startup`, submitted with `ray job submit`. Both have two workers, and
take turns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from time import time

from tests.benchmarks.harness import Result, take_turns
from tests.benchmarks.startup import BARE, JOB
from tests.ray_head import BIN, Head, running_head

ROUNDS = 3


def ours(head: Head) -> float:
    """Seconds until the journal's first step."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    own |= {"RAY_AUTH_TOKEN": head.token, "RAY_API_SERVER_ADDRESS": head.address}
    started = time()
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "submit", str(JOB), "--yes", "--fresh", "--json",
         "--set", "workers.num=2"],
        capture_output=True, text=True, check=True, env=own,
    )  # fmt: skip
    storage = Path(json.loads(done.stdout)["storage"])
    points = map(json.loads, (storage / "curve.jsonl").read_text().splitlines())
    return float(next(point for point in points if "train" in point)["time"] / 1000 - started)


def bare(head: Head) -> float:
    """Seconds until the bare script's first step."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "bare.py").write_text(BARE)
        stamp = Path(head.environment["HOME"]) / "first_step"
        started = time()
        subprocess.run(
            [str(BIN / "ray"), "job", "submit", "--address", head.address, "--working-dir", ".",
             "--", "python", "bare.py", str(stamp)],
            cwd=name, capture_output=True, check=True, env=head.environment,
        )  # fmt: skip
    return float(stamp.read_text()) - started


def results(rounds: int, quick: bool) -> Iterator[Result]:
    """Median seconds of each, and their ratio to the bare script's."""
    with tempfile.TemporaryDirectory() as home, running_head(Path(home)) as head:
        contestants = {"pipeline submit": partial(ours, head), "bare script": partial(bare, head)}
        seconds = take_turns(contestants, rounds)
    base = median(seconds["bare script"])
    for name, values in seconds.items():
        yield {"case": name, "seconds": median(values), "of_bare": median(values) / base}
