"""A signal ends a command even where a library drops the error that it raises."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pipeline
from pipeline.errors import StoppedError
from pipeline.launch.signals import signals_raise
from pipeline.tracking import process
from tests.conftest import Write

DROPS = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGNUM)
    for _ in range(1000): pass
except BaseException:
    pass
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_one_that_is_dropped_before_training_begins(name: str, job: Write, tmp_path: Path) -> None:
    module = tmp_path / f"drops_{name}.py"
    module.write_text(DROPS.replace("SIGNUM", name))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError) as caught:
        pipeline.run(job(), imports=[str(module)])
    assert caught.value.exit_code == 128 + signal.Signals[name]
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_exit_code_is_that_of_the_signal(job: Write, tmp_path: Path) -> None:
    """Python has one of its own for a KeyboardInterrupt that goes through an import."""
    (tmp_path / "comes.py").write_text("exec('import os; os.kill(os.getpid(), 15)')")
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "run", job(), "--import", tmp_path / "comes.py"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "stopped by SIGTERM" in done.stderr


def test_one_that_was_heard_is_forgotten_at_the_end() -> None:
    def interrupted() -> None:
        with signals_raise():
            with contextlib.suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
            with signals_raise():
                pytest.fail("it is dropped")

    for _ in range(2):
        with pytest.raises(StoppedError):
            interrupted()
    with signals_raise(), signals_raise():
        pass


def test_one_that_cuts_a_folds_recording_off_begins_no_other_fold(
    job: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    end = process.end

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return end(*arguments)

    monkeypatch.setattr(process, "end", interrupted)
    with pytest.raises(StoppedError):
        pipeline.run_folds(job(), num_folds=2, say=said.append)
    assert [line for line in said if line.startswith("fold ")] == ["fold  1 of 2"]
