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


def assert_same_bits(make: Callable[[], Job], folder: Path, num: int, kills: list[int]) -> None:
    """Training ends with the bits of one worker's: on `num`, and on `num` and 1 in turns, killed
    before these steps. A checkpoint every few steps is the job's own matter."""
    on_workers(1, partial(_trained, make=make, run=folder / "alone", killed_at=None))
    on_workers(num, partial(_trained, make=make, run=folder / "several", killed_at=None))
    turns = [num, 1] * (len(kills) // 2 + 1)
    for workers, step in zip(turns, [*kills, None], strict=False):
        on_workers(workers, partial(_trained, make=make, run=folder / "resumed", killed_at=step))
    assert Done.read(folder / "resumed" / "done.json").workers == turns[: len(kills) + 1]
    assert outcome(folder / "several") == outcome(folder / "alone")
    assert outcome(folder / "resumed") == outcome(folder / "alone")


def _trained(
    rank: int, num: int, *, make: Callable[[], Job], run: Path, killed_at: int | None
) -> None:
    run.mkdir(exist_ok=True)

    def before_step(step: int) -> None:
        if step == killed_at:
            raise KilledError

    with contextlib.suppress(KilledError):
        train(make(), RunDir(run), before_step)
