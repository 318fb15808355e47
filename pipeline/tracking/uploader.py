"""The process beside training that records a run: `python -m pipeline.tracking.uploader FOLDER`.

Without a folder it imports what it will need, and reads the folder's path from its input.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import math
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from pipeline.redact import redact
from pipeline.report.drawing import Drawing
from pipeline.rundir import RunDir
from pipeline.rundir.records import Ended, Launcher, Record, Recorded
from pipeline.tracking.client import prepare_environment
from pipeline.tracking.names import environment_uri
from pipeline.tracking.process import ALONE
from pipeline.tracking.upload import SupersededError, Upload

EVERY_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0  # between tries at a server that does not answer
PATIENCE_SECONDS = 30.0
"""After training's end, for a server that does not answer; PIPELINE_UPLOAD_PATIENCE_SECONDS."""
KILLED_PATIENCE_SECONDS = 5.0
"""The most after a signal: whoever sent it does not wait for long."""
to_import = [
    "mlflow.store.tracking.sqlalchemy_store",
    "pipeline.tracking.model",
    "pipeline.tracking.serving",
]
"""Modules that take long, in the order in which they are needed."""
QUIET_SECONDS = 10.0  # without a new point, after which a run without its launcher has ended


def main(path: str = "", word: str = "") -> int:
    """Record the run in the folder `path`, or in the one that the input names.

    Signals do not end it: `ray job stop` sends them to all processes, and the command that trains
    says when to end.
    """
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    if not path or (word != ALONE and not RunDir(Path(path)).ended.exists()):
        _lower_priority()
    drawing = Drawing()
    if path:
        return record(RunDir(Path(path)), drawing, word == ALONE)
    _import_all(drawing, lambda: bool(select.select([sys.stdin], [], [], 0)[0]))  # or it has ended
    path = sys.stdin.readline().rstrip("\n")
    if not path:  # the command has ended without a run
        return 0
    run = RunDir(Path(path))
    with run.uploader_log.open("wb") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    return record(run, drawing)


def _import_all(drawing: Drawing, is_needed: Callable[[], bool]) -> None:
    """What takes seconds to import, as long as there is nothing else to do."""
    prepare_environment()
    while to_import and not is_needed():
        with contextlib.suppress(ImportError):  # said where it is needed
            importlib.import_module(to_import.pop(0))
    if not to_import:
        drawing.start()


def record(run: RunDir, drawing: Drawing, is_alone: bool = False) -> int:
    """Upload until training has ended; 0 when the record is complete.

    `is_alone` says that there is no command any more that trains it.
    """
    launcher = Record.read(run.record).launcher
    with FileLock(run.uploader_lock):  # an earlier launcher's upload ends first
        return _upload(run, launcher, drawing, is_alone)


def _upload(run: RunDir, launcher: Launcher, drawing: Drawing, is_alone: bool) -> int:
    """Upload as long as `launcher` has not handed the run over to another one."""
    while _is_starting(run) and not _read_end(run, is_alone):
        time.sleep(0.1)
    upload: Upload | None = None
    deadline = float("inf")
    pause = EVERY_SECONDS
    printed = ""
    while True:
        if Record.read(run.record).launcher != launcher:
            return 0  # another command has resumed the run, and uploads it
        ended = _read_end(run, is_alone)
        if ended and deadline == float("inf"):
            deadline = time.monotonic() + _patience(ended.state == "killed" and not is_alone)
        try:
            upload = upload or Upload(run, drawing)
            upload.read()
            if ended and ended.state != "killed":
                upload.draw()
            upload.begin()
            if ended:
                upload.finish(ended)
                return 0
            upload.send_points()
            upload.send_system()
            upload.describe()
            if upload.state.error:
                upload.save(error="")
            _import_all(drawing, run.ended.exists)
            pause = EVERY_SECONDS
        except SupersededError as error:
            assert upload is not None
            upload.save(error=str(error))
            return 0
        except Exception as error:  # whatever a server or disk does, training is not to feel it
            reason = _reason(error, upload)
            if reason != printed:
                text = redact(traceback.format_exc(), environment_uri())
                print(text, file=sys.stderr, flush=True)
            printed = reason
            if upload is not None:
                upload.save(complete=False, error=reason[:500])
            elif not run.recorded.exists():
                Recorded(error=reason[:500]).write(run.recorded)
            if time.monotonic() > deadline:
                return 3
            pause = EVERY_SECONDS if ended else min(2 * pause, LONGEST_PAUSE_SECONDS)
        _wait(run, pause)


def _patience(is_short: bool) -> float:
    """Seconds that an ended run's record may take where MLflow cannot be told."""
    seconds = float(os.environ.get("PIPELINE_UPLOAD_PATIENCE_SECONDS", PATIENCE_SECONDS))
    return min(seconds, KILLED_PATIENCE_SECONDS if is_short else math.inf)


def _reason(error: Exception, upload: Upload | None) -> str:
    """What keeps MLflow from being told, where, and whether another server could be told."""
    reason = redact(str(error).partition("\n")[0] or type(error).__name__, environment_uri())
    reason = " ".join(reason.split())
    if "Max retries exceeded" in reason or "Connection aborted" in reason:
        reason = "MLflow's server does not answer"
    if upload is None:
        return reason
    other = "" if upload.state.run_id else "; MLFLOW_TRACKING_URI can name another"
    return f"{reason} ({upload.state.tracking_uri}{other})"


def _lower_priority() -> None:
    """Training comes first: this process takes the time that is left."""
    os.nice(19)
    if hasattr(os, "SCHED_IDLE"):  # Linux: woken workers need not wait for their turn
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def _is_starting(run: RunDir) -> bool:
    """Whether several workers are still starting: importing MLflow now would hold them up."""
    return Record.read(run.record).num_workers > 1 and not run.journal.exists()


def _wait(run: RunDir, seconds: float) -> None:
    """Wait for the next upload, or until training ends meanwhile."""
    until = time.monotonic() + seconds
    already = run.ended.exists()
    while time.monotonic() < until and run.ended.exists() == already:
        time.sleep(0.02)


def _read_end(run: RunDir, is_alone: bool) -> Ended | None:
    """How training ended and why, or None while it has not."""
    if ended := run.read_ended():
        is_done = ended.state != "finished" and run.is_finished  # after it was stopped
        return Ended(state="finished") if is_done else ended
    launcher = Record.read(run.record).launcher
    if not is_alone and os.getppid() == launcher.pid:
        return None
    if run.is_finished:
        return Ended(state="finished")
    # workers may outlive the launcher for a moment
    exists = run.journal.exists()
    quiet = time.time() - run.journal.stat().st_mtime if exists else QUIET_SECONDS
    if quiet < QUIET_SECONDS:
        return None
    return Ended(state="failed", reason="the command was killed")


if __name__ == "__main__":
    atexit.register(gc.freeze)  # the kernel frees faster what Python would collect for a second
    sys.exit(main(*sys.argv[1:]))
