"""Which attempt at a run may write: the last one that took the lease.

A worker that was stopped, or cut off, and wakes up beside its successor must not write any more.
On one machine the successor kills it; elsewhere it looks at the lease before it writes.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import psutil

from pipeline.errors import RunError
from pipeline.files.atomic import delete_temporaries
from pipeline.rundir.layout import RunDir
from pipeline.rundir.records import Holder

WAIT_SECONDS = 10.0
"""How long a process that was killed may take to be gone."""
CLOCK_SECONDS = 1.0
"""How far a process's start may seem to move when the clock is corrected."""


class Lease:
    """The right of one process to write a run's journal, checkpoints and result."""

    def __init__(self, run: RunDir, holder: Holder) -> None:
        self.run, self.holder = run, holder

    @classmethod
    def take(cls, run: RunDir, is_own_process: bool) -> Lease:
        """Take the lease over from an earlier attempt, whose process is killed if it is here.

        With `is_own_process` a successor may kill this process.
        """
        before = _read(run.lease)
        if before is not None:
            _end(before)
        holder = Holder(
            attempt=before.attempt + 1 if before else 1,
            host=socket.gethostname(),
            pid=os.getpid(),
            started=_start_of(os.getpid()),
            is_own_process=is_own_process,
        )
        holder.write(run.lease)
        results = (run.weights, run.done, run.held_out, run.importance, run.nonfinite)
        for path in (run.journal, run.checkpoints / "step-*", *results):
            delete_temporaries(path)  # that nobody may put in place now
        return cls(run, holder)

    def check(self) -> None:
        """Raise RunError if another process has taken the lease over."""
        now = _read(self.run.lease)
        if now is not None and now != self.holder:
            raise RunError(
                f"attempt {now.attempt} at this run, by process {now.pid} on {now.host}, "
                f"has taken over from attempt {self.holder.attempt}, which writes nothing more"
            )


def _read(path: Path) -> Holder | None:
    """Who has the lease; None at the first attempt, and where nobody can tell any more."""
    try:
        return Holder.read(path)
    except (OSError, ValueError):
        return None


def _end(holder: Holder) -> None:
    """Kill a worker of an earlier attempt that is still there, as one that was stopped."""
    if (
        not holder.is_own_process
        or holder.host != socket.gethostname()
        or not holder.started
        or holder.pid < 2
        or holder.pid == os.getpid()
    ):
        return
    until = time.monotonic() + WAIT_SECONDS
    while _is_running(holder) and time.monotonic() < until:
        try:
            os.kill(holder.pid, signal.SIGKILL)
        except OSError:
            return
        time.sleep(0.05)


def _is_running(holder: Holder) -> bool:
    return abs(_start_of(holder.pid) - holder.started) < CLOCK_SECONDS


def _start_of(pid: int) -> float:
    """When the process started, which tells it from others of that id; 0 if there is none."""
    try:
        process = psutil.Process(pid)
        return 0.0 if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return 0.0
