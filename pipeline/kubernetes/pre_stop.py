"""Before a head's pod ends: the command that trains there saves its state and ends.

Kubernetes runs it (`preStop`) in the pod's working directory before it signals the processes, and
waits for it. Ray would end the command without a word to it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time

import psutil

COMMAND = ["-m", "pipeline", "run"]


def end_commands(folder: str, seconds: float) -> list[int]:
    """Send SIGTERM to commands that train from a folder; the ids of those that go on after it."""
    commands = [process for process in psutil.process_iter() if _trains(process, folder)]
    for process in commands:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    deadline = time.monotonic() + seconds
    while (running := [one.pid for one in commands if _runs(one)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return running


def _runs(process: psutil.Process) -> bool:
    """Whether it has not ended; one that nobody has asked for its exit code has."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _trains(process: psutil.Process, folder: str) -> bool:
    try:
        words, at = process.cmdline(), process.cwd()
    except psutil.Error:  # it has ended, or is not ours
        return False
    starts = range(len(words) - len(COMMAND) + 1)
    return at == folder and any(words[i : i + len(COMMAND)] == COMMAND for i in starts)


if __name__ == "__main__":
    end_commands(os.getcwd(), float(sys.argv[1]))
