"""Which attempt at a run may write: the last one that said so.

A worker that was stopped, or cut off, and wakes up beside its successor must not write any more.
On one machine the successor ends it; elsewhere it looks at the lease before it writes.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

from pipeline.errors import RunError
from pipeline.train import files

WAIT_SECONDS = 10.0
"""For a process that was killed to be gone."""


class Lease:
    """The right of one process to write a run's journal and checkpoints."""

    def __init__(self, folder: Path, is_own_process: bool) -> None:
        """Take the lease over. With `is_own_process` a successor may kill this process."""
        self.path = folder / files.LEASE
        before = _read(self.path)
        _end(before)
        self.number = before.get("number", 0) + 1
        self._holder = {
            "number": self.number, "host": socket.gethostname(), "pid": os.getpid(),
            "started": _started(os.getpid()), "is_own_process": is_own_process,
        }  # fmt: skip
        files.write_json(self.path, self._holder)
        for name in (files.CURVE, files.WEIGHTS, files.DONE, files.CHECKPOINTS):
            files.delete_asides(folder / name)  # that nobody may put in place now

    def check(self) -> None:
        """Raise RunError if another process has taken the lease over."""
        now = _read(self.path)
        if now and not self._is_own(now):
            raise RunError(
                f"attempt {now['number']} at this run, by process {now['pid']} on {now['host']}, "
                f"has taken over from attempt {self.number}, which writes nothing more"
            )

    def _is_own(self, holder: dict[str, Any]) -> bool:
        keys = ("number", "host", "pid", "started")
        return all(holder.get(key) == self._holder[key] for key in keys)


def _read(path: Path) -> dict[str, Any]:
    try:
        return files.read_json(path)
    except (OSError, ValueError):  # the first attempt; or nobody can tell any more
        return {}


def _end(holder: dict[str, Any]) -> None:
    """Kill a worker of an earlier attempt that is still there, as one that was stopped."""
    pid = holder.get("pid")
    if (
        not holder.get("is_own_process") or holder.get("host") != socket.gethostname()
        or not holder.get("started") or type(pid) is not int or pid < 2 or pid == os.getpid()
    ):  # fmt: skip
        return
    until = time.monotonic() + WAIT_SECONDS
    while _started(pid) == holder.get("started") and time.monotonic() < until:
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            return
        time.sleep(0.05)


def _started(pid: int) -> str:
    """When the process started, in the kernel's ticks: tells it from others of that number."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]
