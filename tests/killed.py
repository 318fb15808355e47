"""One job alone, on several workers, and killed in between: the same bits?"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.rundir import RunDir
from pipeline.rundir.journal import Reader, curve_sha256
from pipeline.rundir.records import Done
from pipeline.spec import load
from pipeline.train.job import Job, prepare
from pipeline.train.loop import train
from tests.processes import on_workers


class KilledError(Exception):
    """Ends a worker before a step."""


def job_of(tree: dict[str, Any], folder: Path) -> Job:
    """The job of a spec whose paths start at the folder."""
    return prepare(load(tree), folder)


def outcome(run: Path) -> tuple[str, Any, str]:
    """Hash of the curve with its evaluations, what the test rows get, hash of the weights."""
    points = list(Reader(run / "curve.jsonl").new())
    evaluations = json.dumps([one["validation"] for one in points if "validation" in one])
    done = Done.read(run / "done.json")
    return curve_sha256(points) + evaluations, done.test, done.weights_sha256


def assert_same_bits(make: Callable[[], Job], folder: Path, kills: list[int]) -> None:
    """Training ends with the same bits on 1, 2 and 3 workers, and on 3, 1 and 2 in turns, killed
    before these steps, two at most. A checkpoint every few steps is the job's own matter."""
    for num in (1, 2, 3):
        on_workers(num, partial(_trained, make=make, run=folder / f"on{num}", killed_at=None))
        assert outcome(folder / f"on{num}") == outcome(folder / "on1")
    turns = [3, 1, 2][: len(kills) + 1]
    for num, step in zip(turns, [*kills, None], strict=True):
        on_workers(num, partial(_trained, make=make, run=folder / "resumed", killed_at=step))
    assert Done.read(folder / "resumed" / "done.json").workers == turns
    assert outcome(folder / "resumed") == outcome(folder / "on1")


def _trained(
    rank: int, num: int, *, make: Callable[[], Job], run: Path, killed_at: int | None
) -> None:
    run.mkdir(exist_ok=True)

    def before_step(step: int) -> None:
        if step == killed_at:
            raise KilledError

    with contextlib.suppress(KilledError):
        train(make(), RunDir(run), before_step)
