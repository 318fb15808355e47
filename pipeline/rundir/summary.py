"""A run's folder in a line: how far it is, how good, and since when."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from pipeline.rundir.journal import parse_line
from pipeline.rundir.layout import RunDir
from pipeline.rundir.records import Done, EvaluationPoint, Numbers, Record

RunState = Literal["finished", "training", "stopped", "failed"]


@dataclass(frozen=True)
class Summary:
    """What a table of runs says of one."""

    run: RunDir
    record: Record
    state: RunState
    steps: int
    metrics: Numbers
    """Of the best evaluation where the job keeps it, else of the last one; `test/...` too."""
    baselines: Numbers
    started: float
    """When its first line was written, in seconds since 1970."""
    seconds: float
    """From its first line to its last, pauses included."""

    def to_json(self) -> dict[str, Any]:
        """The same for other programs."""
        return {
            "name": self.run.name,
            "storage": str(self.run.path),
            "job": self.record.job,
            "state": self.state,
            "steps": self.steps,
            "num_steps": self.record.num_steps,
            "primary_metric": self.record.primary_metric,
            "metrics": self.metrics,
            "baselines": self.baselines,
            "started": self.started,
            "seconds": self.seconds,
        }

    @property
    def age(self) -> float:
        """Seconds since its last line."""
        return time.time() - self.started - self.seconds


def summaries(storage: Path) -> Iterator[Summary]:
    """The runs in a storage, the newest first; folders that are no runs are left out."""
    found = [one for path in storage.iterdir() if (one := summary(RunDir(path)))]
    yield from sorted(found, key=lambda one: -one.started)


def summary(run: RunDir) -> Summary | None:
    """What its folder says of a run by now; None without a record that can be read."""
    try:
        record = run.read_record()
    except (OSError, ValueError):
        record = None
    if record is None:
        return None
    first, last, evaluations = _ends(run.journal)
    metrics: Numbers = dict(evaluations[-1]["validation"]) if evaluations else {}
    baselines = next((one["baselines"] for one in evaluations if "baselines" in one), {})
    done = run.read_done()
    if done is not None and done.best is not None:
        metrics = done.best.metrics
    if done is not None and done.test is not None:
        metrics = metrics | _below("test", done.test.metrics)
        baselines = baselines | _below("test", done.test.baselines)
    began = first or int(1000 * run.record.stat().st_mtime)
    steps = done.steps if done else last[0]
    seconds = (max(last[1], done.time if done else 0, began) - began) / 1000
    return Summary(run, record, _state(run, done), steps, metrics, baselines, began / 1000, seconds)


def _below(split: str, numbers: Numbers) -> Numbers:
    return {f"{split}/{name}": value for name, value in numbers.items()}


def _state(run: RunDir, done: Done | None) -> RunState:
    if done is not None:
        return "finished"
    holder = run.path / ".lock-holder"
    if holder.exists():  # which a killed command leaves; then nobody has the lock
        try:
            FileLock(run.path / ".lock", timeout=0).acquire().lock.release()
        except Timeout:
            return "training"
        except OSError:  # a lock that this user cannot take tells nothing
            return "stopped"
    ended = run.read_ended()
    return "failed" if ended is not None and ended.state == "failed" else "stopped"


def _ends(path: Path) -> tuple[int, tuple[int, int], list[EvaluationPoint]]:
    """Time of a journal's first line; step and time of its last; its first and last evaluation.

    Only these lines are parsed, as a journal may be long.
    """
    first, last = b"", b""
    evaluations: list[bytes] = []
    with contextlib.suppress(OSError), path.open("rb") as file:
        for line in file:
            first = first or line
            if b'"validation": {' in line:
                evaluations[1:] = [line]
            elif b'"train": {' in line:
                last = line
    begin = end = 0
    step = 0
    with contextlib.suppress(ValueError):
        begin = end = parse_line(first)["time"]
    with contextlib.suppress(ValueError):
        point = parse_line(last)
        step, end = point["step"], point["time"]
    read: list[EvaluationPoint] = []
    for line in evaluations:
        with contextlib.suppress(ValueError):
            point = parse_line(line)
            if "validation" in point:
                read.append(point)
    return begin, (step, end), read
