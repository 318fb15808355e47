"""Repair of a journal: what is intact up to the first gap, and only by whoever has the lease."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import RunError
from pipeline.rundir import RunDir
from pipeline.rundir.journal import Journal, parse_line
from pipeline.rundir.lease import Lease
from pipeline.rundir.records import Start
from pipeline.rundir.repair import repair
from tests.rundir.test_journal import point


def evaluated(step: int) -> bool:
    return step % 2 == 0


def start(step: int) -> Start:
    return {"event": "start", "step": step, "attempt": 1, "workers": 3, "reached": step, "bits": {}}


def intact_journal(path: Path, steps: int = 6) -> list[bytes]:
    """Lines of a journal with an evaluation every two steps."""
    path.unlink(missing_ok=True)
    journal = Journal(path)
    journal.event(start(0))
    for step in range(steps + 1):
        if step:
            journal.write(point(step, 1 / step))
        if evaluated(step):
            journal.write({"step": step, "epoch": 0.1, "validation": {"loss": 1.0}})
    journal.close()
    return path.read_bytes().splitlines(keepends=True)


def test_a_journal_is_intact_up_to_its_first_gap(tmp_path: Path) -> None:
    path = tmp_path / "curve.jsonl"
    lines = intact_journal(path)
    assert repair(path, evaluated) == (6, "")
    journal = Journal(path, step=4)
    journal.event(start(4))  # of an attempt that was killed at once
    journal.close()
    assert repair(path, evaluated) == (6, ""), "what was done before counts"
    steps = [curve_line["step"] for curve_line in map(parse_line, lines)]
    for number, step in enumerate(steps[1:], start=1):
        path.write_bytes(b"".join(lines[:number] + lines[number + 1 :]))
        steps_left, problem = repair(path, evaluated)
        assert steps_left == step - 1, f"line {number} is lost"
        assert bool(problem) == (number < len(lines) - 1)


def test_a_superseded_attempt_cannot_touch_the_journal(tmp_path: Path) -> None:
    """It wakes up before it has opened it, or after."""
    path = tmp_path / "curve.jsonl"
    old = Lease.take(RunDir(tmp_path), is_own_process=False)
    asleep = Journal(path)
    asleep.write(point(1, 0.5))
    new = Lease.take(RunDir(tmp_path), is_own_process=False)
    intact_journal(path)
    written = path.read_bytes()
    with pytest.raises(RunError, match="has taken over"):
        repair(path, evaluated, old.check)
    with pytest.raises(RunError, match="was replaced"):
        asleep.flush()
    new.check()
    RunDir(tmp_path).lease.unlink()
    Lease.take(RunDir(tmp_path), is_own_process=False)
    with pytest.raises(RunError, match="has taken over"):
        new.check()
    assert path.read_bytes() == written
