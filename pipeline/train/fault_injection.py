"""Planned faults, for `prove` and for tests: a worker that dies before a step."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence

from pipeline.rundir import RunDir

Fault = tuple[int, int]
"""Rank and step: this worker is killed before this step (from 0), once."""


def plan_faults(faults: Sequence[Fault], run: RunDir, rank: int) -> Callable[[int], None]:
    """What the worker calls before each step.

    A fault that has struck leaves a file in the run's folder, and does not strike again.
    """
    marks = {step: run.fault_mark(rank, step) for r, step in faults if r == rank}

    def strike(step: int) -> None:
        mark = marks.get(step)
        if mark is not None and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    return strike
