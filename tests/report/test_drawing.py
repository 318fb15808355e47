"""The process that draws: what it makes, when it dies, when it fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.report.curves import Curves
from pipeline.report.drawing import Drawing, draw
from pipeline.rundir import RunDir
from tests.report.test_build import run_of

CURVES = Curves()
POINTS: list[Any] = [
    {"step": step, "time": step, "train": {"loss": 1.0 / step}, "terms": {"mse": 1.0 / step}}
    for step in range(1, 20)
]


@pytest.mark.processes
def test_it_makes_what_this_process_makes(tmp_path: Path) -> None:
    run = run_of(tmp_path, "mse", "amount")
    drawing = Drawing()
    drawing.begin(run, "title", Curves().add(POINTS))
    drawing.begin(run, "another", CURVES)  # the first is being drawn
    files = drawing.files()
    assert files == draw(run, "title", Curves().add(POINTS))
    assert {"report.html", "report/01_loss.png", "report/01_loss.csv"} < set(files)
    assert drawing.files() is files


@pytest.mark.processes
def test_a_process_that_died_is_replaced_and_a_failure_says_why(tmp_path: Path) -> None:
    drawing = Drawing()
    drawing.start()
    assert drawing._process is not None
    drawing._process.kill()
    drawing._process.wait()
    nothing: Any = None
    drawing.begin(RunDir(tmp_path), nothing, CURVES)
    with pytest.raises(RuntimeError, match=r"\Athe report cannot be drawn: .*\nTraceback"):
        drawing.files()
    drawing.begin(RunDir(tmp_path), "title", CURVES)
    drawing._process.kill()
    with pytest.raises(RuntimeError, match="ended with -9"):
        drawing.files()
    drawing.begin(RunDir(tmp_path), "title", CURVES)
    assert drawing.files().keys() == {"report.html"}


@pytest.mark.processes
def test_it_ends_with_the_process_that_started_it() -> None:
    command = [sys.executable, "-m", "pipeline.report.drawing"]
    ended = subprocess.run(command, input=b"", capture_output=True, timeout=60, check=True)
    assert ended.stdout == ended.stderr == b""
