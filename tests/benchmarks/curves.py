"""How far curves of different numbers of workers are apart without micro-batches.

For every job in jobs/ and a transformer over ragged lists, without dropout: the largest relative
difference of a loss over the first 50 steps on two, three and four gloo workers from those on one,
each worker having one micro-batch and DDP summing. With `training.microbatch_size` it is 0.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from pipeline import plugins
from pipeline.rundir import RunDir
from pipeline.rundir.journal import Reader
from pipeline.spec import load
from pipeline.train.job import prepare
from pipeline.train.loop import train
from tests.benchmarks.harness import Result
from tests.conftest import JOBS
from tests.processes import on_workers
from tests.scenarios.test_same_bits import JOB_NAMES, TRANSFORMER, transformer

ROUNDS, STEPS, WORKERS = 1, 50, (2, 3, 4)
Losses = dict[str, list[float | None]]


def first_losses(precision: str, rank: int, num: int) -> Losses:
    """The first losses of every job, from the first worker."""
    plugins.load([str(JOBS / "custom_loss.py")])
    return {name: _losses(name, precision) for name in JOB_NAMES}


def _losses(name: str, precision: str) -> list[float | None]:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        source: Any = transformer(folder) if name == TRANSFORMER else JOBS / f"{name}.yaml"
        changes: dict[str, Any] = {
            "training.microbatch_size": None,
            "training.precision": precision,
        }
        if name == TRANSFORMER:
            changes["model.dropout"] = 0.0
        train(prepare(load(source, changes), JOBS), RunDir(folder), num_steps=STEPS)
        points = list(Reader(folder / "curve.jsonl").new())
        return [p["train"]["loss"] for p in points if "train" in p]


def difference(one: list[float | None], other: list[float | None]) -> float:
    """Largest relative difference of two curves."""
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    return max(abs(a - b) / max(abs(a), abs(b), 1e-300) for a, b in pairs)


def table(precision: str, numbers: tuple[int, ...]) -> dict[str, list[float]]:
    """The differences of each job, for each number of workers."""
    alone: Losses = on_workers(1, partial(first_losses, precision))[0]
    found: dict[str, list[float]] = {name: [] for name in JOB_NAMES}
    for num in numbers:
        curves: Losses = on_workers(num, partial(first_losses, precision))[0]
        for name in JOB_NAMES:
            found[name].append(difference(curves[name], alone[name]))
    return found


def results(rounds: int, quick: bool) -> Iterator[Result]:
    """The largest relative difference of a loss, by number of workers."""
    numbers = (2,) if quick else WORKERS
    both = {precision: table(precision, numbers) for precision in ("float32", "float64")}
    for name in JOB_NAMES:
        yield {
            "case": name, "steps": STEPS, "workers": numbers,
            **{precision: rows[name] for precision, rows in both.items()},
        }  # fmt: skip
