"""What is shown while a job trains: on a terminal of any width, and in a file."""

from __future__ import annotations

import io
import os
import shutil
import time
from pathlib import Path

import pytest

from pipeline.launch.progress import CLEAR, Progress
from pipeline.rundir.journal import Journal, Reader
from pipeline.rundir.records import StepPoint


class Terminal(io.StringIO):
    """Keeps what is written to it."""

    def isatty(self) -> bool:
        return True


def shown(path: Path, stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> str:
    """What is written of the journal at `path`."""
    monkeypatch.setattr("sys.stderr", stream)
    with Progress(Reader(path), 25_500, 17, 385, lambda: "", "starting 2 Ray workers ..."):
        time.sleep(0.3)
    return stream.getvalue()


def point(step: int, loss: float = 0.26905) -> StepPoint:
    return {"step": step, "epoch": 1.0, "terms": {}, "train": {"loss": loss}}


@pytest.mark.parametrize("columns", [30, 80, 200])
def test_a_terminal_shows_as_much_as_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    size = os.terminal_size((columns, 24))
    monkeypatch.setattr(shutil, "get_terminal_size", lambda *_, **__: size)
    path = tmp_path / "curve.jsonl"
    written = Journal(path)
    written.write(point(13_000))
    written.write({"step": 13_000, "epoch": 1.0, "validation": {"loss": 0.0483, "accuracy": 0.98}})
    time.sleep(0.01)
    written.write(point(13_582))
    written.close()
    lines = shown(path, Terminal(), monkeypatch).replace("\r", "\n").split("\n")
    assert any("starting 2 Ray" in line for line in lines)
    last = [line.removeprefix(CLEAR[1:]) for line in lines if "epoch" in line][-1]
    assert len(last) < columns
    assert last.startswith("epoch 799/1500")
    assert ("val accuracy 0.98" in last) == (columns >= 80)
    assert ("rows/s" in last) == (columns == 200)


def test_an_evaluation_before_the_first_step_is_not_a_recomputed_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.rundir.journal.PROGRESS_EVENT_SECONDS", 0.0)
    path = tmp_path / "curve.jsonl"
    for _ in range(2):
        written = Journal(path)
        written.write({"step": 0, "epoch": 0.0, "validation": {"loss": 1}})
        written.close()
    assert "recomputed" not in shown(path, Terminal(), monkeypatch)


def test_recomputed_steps_with_other_numbers_are_not_called_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "curve.jsonl"
    for first, loss in ((0, 0.5), (4, 0.25), (2, 0.5)):
        written = Journal(path, step=first)
        for step in range(first + 1, 8):
            written.write(point(step, loss))
        written.close()
    assert written.first_difference == 5, "of the attempt before"
    text = shown(path, io.StringIO(), monkeypatch)
    assert "5 steps were recomputed" not in text, "some had other numbers"
    assert "loss 0.5" in text.rstrip().splitlines()[-1]


def test_recomputed_steps_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "curve.jsonl"
    first = Journal(path)
    for step in range(1, 40):
        first.write(point(step))
    first.close()
    again = Journal(path, step=9)
    again.event({
        "step": 9, "event": "start", "attempt": 2, "workers": 3, "reached": again.reached,
        "bits": {},
    })  # fmt: skip
    monkeypatch.setattr("pipeline.rundir.journal.PROGRESS_EVENT_SECONDS", 0.0)
    for step in range(10, 30):
        again.write(point(step))
    again.flush()
    text = shown(path, Terminal(), monkeypatch)
    assert "resuming from step 9 with 3 workers (attempt 2): 30 steps are recomputed" in text
    assert "step 29 of 39, recomputed" in text
    for step in range(30, 42):
        again.write(point(step))
    again.close()
    text = shown(path, io.StringIO(), monkeypatch)
    assert "30 steps were recomputed, with the numbers that stand in the curve" in text
    assert "step 41/25500" in text
    assert CLEAR not in text
