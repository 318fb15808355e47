"""A run's folder: its lock, and what makes a finished run intact."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import UsageError
from pipeline.rundir import RunDir
from pipeline.rundir.layout import facts_of
from pipeline.rundir.records import Done


def test_a_locked_run_is_refused_with_who_has_it(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with run.locked():
        with pytest.raises(UsageError, match=r"right now, by process \d+ on "), run.locked():
            pass
        (tmp_path / ".lock-holder").unlink()  # of a command that has not written it yet
        with pytest.raises(UsageError, match="right now, by another command"), run.locked():
            pass
    with run.locked():
        pass


def test_a_finished_run_is_intact_until_a_file_of_it_changes(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert not run.is_finished
    run.journal.write_bytes(b"curve")
    run.weights.write_bytes(b"weights")
    files = {path.name: facts_of(path) for path in (run.journal, run.weights)}
    Done(
        steps=1, time=0, weights_sha256="", files=files, best=None, workers=[1],
        first_difference=None,
    ).write(run.done)  # fmt: skip
    assert run.is_intact
    run.weights.write_bytes(b"w3ights")
    assert run.damage() == "weights.pt is damaged"
    run.journal.unlink()
    assert run.damage() == "curve.jsonl is missing"
    run.done.write_text("{}")
    assert run.damage() == "done.json is damaged"


def test_folders_that_are_no_checkpoints_are_left_alone(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for name in ("step-0000000150", "step-0000000150.bak", "step-old", "step-7"):
        (run.checkpoints / name).mkdir(parents=True)
    assert run.saved_steps() == [150]
