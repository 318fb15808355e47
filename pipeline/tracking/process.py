"""The command's side of the record: start the process that uploads it, and wait for its end.

Training never waits for it: `uploader` runs beside it and reads the run's folder.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pipeline.errors import RecordError, UsageError
from pipeline.rundir import RunDir
from pipeline.rundir.records import Ended, Recorded

ALONE = "alone"
"""Says to the uploader that no command trains the run."""
COMMAND = (sys.executable, "-m", "pipeline.tracking.uploader")
PATIENCE_SECONDS = 3.0
"""How long the command waits before it tells the user what for."""


@contextlib.contextmanager
def warming_up() -> Iterator[subprocess.Popen[bytes]]:
    """A process that will upload a run, which imports what that takes while the rows are prepared.

    It ends with the block unless it was given a run.
    """
    process = subprocess.Popen(
        [*COMMAND], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdin is not None
    try:
        yield process
    finally:
        if not process.stdin.closed:
            process.kill()
            process.stdin.close()
            process.wait()


def start(run: RunDir, *words: str) -> subprocess.Popen[bytes]:
    """The process that uploads the run's record, apart from the terminal's Ctrl-C."""
    with run.uploader_log.open("wb") as log:
        return subprocess.Popen(
            [*COMMAND, str(run.path), *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def hand_over(process: subprocess.Popen[bytes], run: RunDir) -> subprocess.Popen[bytes]:
    """Let a process that is warming up upload the run; or another one, if it has died."""
    assert process.stdin is not None
    try:
        with process.stdin as stdin:
            stdin.write(f"{run.path}\n".encode())
    except OSError:
        return start(run)
    return process


def end(
    process: subprocess.Popen[bytes],
    run: RunDir,
    ended: Ended,
    tell: Callable[[str], None],
    signals: Sequence[int] = (),
) -> Recorded:
    """Say how training ended, and wait for the rest of the record.

    A number in `signals` cuts that off, now or later.
    """
    try:
        ended.write(run.ended)
    except OSError as error:  # a full disk must not hide why training ended
        process.kill()
        process.wait()
        return Recorded(error=f"{run.path}: {error.strerror}")
    recorded = wait(process, run, tell, signals)
    if process.returncode not in (0, 3) and not signals:  # it died, which another need not
        recorded = wait(start(run), run, tell, signals)
    return recorded


def _raise_priority(pid: int) -> None:
    """Nobody trains any more: the uploader and what it has started come first, where this may be.

    As they are waited for; beside any other load they would hardly run at all.
    """
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with contextlib.suppress(OSError):  # it has ended, or only root may do this
            os.sched_setscheduler(int(task.name), os.SCHED_OTHER, os.sched_param(0))
            os.setpriority(os.PRIO_PROCESS, int(task.name), 0)
        with contextlib.suppress(OSError):
            for child in (task / "children").read_text().split():
                _raise_priority(int(child))


def wait(
    process: subprocess.Popen[bytes],
    run: RunDir,
    tell: Callable[[str], None],
    signals: Sequence[int] = (),
) -> Recorded:
    """What MLflow has, once the process has ended; a first signal ends it."""
    _raise_priority(process.pid)
    patience = time.monotonic() + PATIENCE_SECONDS
    while process.poll() is None and not signals:
        if time.monotonic() > patience:
            problem = trouble(run)
            cause = f" {problem}, it is tried again" if problem else ""
            tell(f"      recording to MLflow ...{cause}")
            patience = float("inf")
        time.sleep(0.05)
    if process.poll() is None:
        process.kill()
        process.wait()
        facts = {"complete": False, "error": "it was cut off by a signal"}
        return run.read_recorded().model_copy(update=facts)
    return run.read_recorded()


def trouble(run: RunDir) -> str:
    """What keeps the record from reaching MLflow at the moment, if anything."""
    return run.read_recorded().error if run.recorded.exists() else ""


def finish(folder: str | Path, signals: Sequence[int] = ()) -> Recorded:
    """Upload what a run's folder holds and MLflow does not, unless `signals` cut that off.

    Raises RecordError when it cannot, and UsageError while a command trains the run.
    """
    run = RunDir(Path(folder).resolve())
    if not run.record.exists():
        raise UsageError(f"{folder}: not the folder of a run (no record.json)")
    with run.locked():
        recorded = wait(start(run, ALONE), run, lambda _: None, signals)
    if not recorded.complete:
        other = "another command has resumed this run, and records it"
        raise RecordError(f"{folder}: {recorded.error or other}")
    return recorded
