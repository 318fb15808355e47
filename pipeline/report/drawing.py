"""The process that draws a run's report: `python -m pipeline.report.drawing`.

It loads its libraries while the run trains, and draws while the model is recorded.
"""

from __future__ import annotations

import gc
import importlib
import os
import pickle
import select
import subprocess
import sys
import traceback

from pipeline.report.build import build
from pipeline.report.curves import Curves
from pipeline.report.exhibit import plot, png
from pipeline.report.facts import facts
from pipeline.report.page import html
from pipeline.rundir import RunDir


class Drawing:
    """One run's report, drawn by a process that ends with this one."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._is_begun = False
        self._files: dict[str, bytes] = {}

    def start(self) -> None:
        """Start the process, ahead of its use."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )

    def begin(self, run: RunDir, title: str, curves: Curves) -> None:
        """Let it draw what the run's folder holds by now, unless that was begun before."""
        if self._is_begun:
            return
        request = pickle.dumps((run, title, curves))
        if self._process is not None and self._process.poll() is not None:
            self._process = None  # it has died
        self.start()
        assert self._process is not None
        assert self._process.stdin is not None
        with self._process.stdin as requests:
            requests.write(request)
        self._is_begun = True

    def files(self) -> dict[str, bytes]:
        """Wait for the report's files, by name: the page, pictures, tables.

        Raises RuntimeError if they could not be made; `begin` then starts anew.
        """
        if not self._files:
            assert self._process is not None
            assert self._process.stdout is not None
            with self._process.stdout as answers:
                content = answers.read()
            status = self._process.wait()
            self._process = None
            if status:
                self._is_begun = False
                raise RuntimeError(content.decode() or f"drawing the report ended with {status}")
            self._files = pickle.loads(content)
        return self._files


def draw(run: RunDir, title: str, curves: Curves) -> dict[str, bytes]:
    """The report's files by name: all on one page, and pictures and tables."""
    report = build(run, curves)
    files = {"report.html": html(title, facts(run, curves), report).encode()}
    for one in report.exhibits:
        files[f"report/{one.name}.csv"] = one.to_csv().encode()
        if one.png is not None:
            files[f"report/{one.name}.png"] = one.png
    return files


def main() -> int:
    """Draw what the input asks for, once, and write the files, or why not, to the output."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
        try:
            png(plot()[0])  # the first picture takes longest
            if not select.select([sys.stdin], [], [], 0)[0]:
                importlib.import_module("sklearn.metrics")  # slow, and not all pictures need it
            request = sys.stdin.buffer.read()
            if request:  # or the other process ended, or its run without a report
                answers.write(pickle.dumps(draw(*pickle.loads(request))))
        except Exception as error:  # whatever it is, the other process says it
            answers.write(f"the report cannot be drawn: {error}\n{traceback.format_exc()}".encode())
            return 1
    return 0


if __name__ == "__main__":
    status = main()
    gc.freeze()  # the kernel frees faster what Python would collect for a second
    sys.exit(status)
