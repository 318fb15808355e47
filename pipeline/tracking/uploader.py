"""Upload one run's journal, params and model: `python -m pipeline.tracking.uploader FOLDER`.

Runs beside training, from a high-water mark kept in the run's folder, and can be run again: a
point that MLflow has already is dropped there, since its time was fixed when it was first written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from pipeline.redact import redact
from pipeline.rundir import RunDir
from pipeline.rundir.journal import Reader
from pipeline.rundir.records import (
    Done,
    Ended,
    EvaluationPoint,
    Launcher,
    Record,
    Recorded,
    Start,
    StepPoint,
)
from pipeline.tracking.client import ERROR, NOTE, Client, Value, values, values_of
from pipeline.tracking.names import environment_uri, with_password
from pipeline.tracking.note import Progress, describe
from pipeline.tracking.process import ALONE

BATCH = 1000  # MLflow's limit of metrics in one request
EVERY_SECONDS = 1.0
DESCRIBE_SECONDS = 30.0
"""Between changes of the description while a run trains."""
LONGEST_PAUSE_SECONDS = 30.0  # between tries at a server that does not answer
PATIENCE_SECONDS = 30.0
"""After training's end, for a server that does not answer; PIPELINE_UPLOAD_PATIENCE_SECONDS."""
KILLED_PATIENCE_SECONDS = 5.0
"""The most after a signal: whoever sent it does not wait for long."""
QUIET_SECONDS = 10.0  # without a new point, after which a run without its launcher has ended
SETTLE_SECONDS = 2.0
"""How long what another machine is sending may take to arrive."""
WARNING = "pipeline.warning"
"""Tag of a run that ended well, and whose model is hardly of use: why."""


class SupersededError(Exception):
    """Another command has resumed the run, from its backup, and records it."""


class Uploader:
    """One run on its way to MLflow; the folder's `recorded.json` holds how far it has come."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.record = Record.read(run.record)
        before = run.read_recorded() if run.recorded.exists() else Recorded()
        if before.run_id:
            uri = with_password(before.tracking_uri)
        else:  # nothing is there yet: a server may have moved
            uri = environment_uri() or with_password(self.record.tracking_uri)
        facts = {"complete": False, "error": "", "tracking_uri": redact(uri)}
        self.state = before.model_copy(update=facts)
        self.reader = Reader(run.journal)
        self.unsent: list[StepPoint | EvaluationPoint] = []
        self.progress = Progress()
        self.described = ""
        """The run's description as MLflow has it."""
        self.described_at = 0.0
        self.rate: float | None = None
        """The learning rate that MLflow was told last."""
        self.has_begun = False
        self.client = Client(uri)

    def save(self, **changes: Any) -> None:
        """Remember how far the upload has come."""
        self.state = self.state.model_copy(update=changes)
        self.state.write(self.run.recorded)

    def begin(self) -> None:
        """Create the run, once, with its params, tags and spec; or resume it."""
        if self.has_begun:
            return
        launcher = self.record.launcher.id
        if not self.state.run_id:
            experiment_id = self.client.experiment_id(self.record.experiment)
            run_id = self.client.find_run(experiment_id, self.record.token)
            uploaded = self._take_over(run_id) if run_id else {}
            run_id = run_id or self.client.create_run(
                experiment_id, self.record.name, self.record.tags
            )
            self.save(
                run_id=run_id, experiment_id=experiment_id, uploaded=uploaded, launcher=launcher
            )
        elif self.state.launcher != launcher:  # it is resumed
            if self.client.launcher(self.state.run_id) not in (self.state.launcher, launcher):
                self.save(uploaded=self._take_over(self.state.run_id))
            self.client.take_over(self.state.run_id, launcher)
            self.save(launcher=launcher)
        if not self.state.begun:
            self.client.log_params(self.state.run_id, self.record.params)
            self.client.log_text(self.state.run_id, self.record.spec, "spec.yaml")
            self.client.log_data(self.state.run_id, self.record.data)
            self.client.choose_primary_metric(
                self.state.experiment_id, self.record.primary_metric, self.record.is_lower_better
            )
            self.save(begun=True)
        self.has_begun = True

    def _take_over(self, run_id: str) -> dict[str, int]:
        """Take the run from another machine; how far that has uploaded it."""
        self.client.take_over(run_id, self.record.launcher.id)
        time.sleep(SETTLE_SECONDS)
        return self.client.uploaded(run_id)

    def _refuse_superseded(self) -> None:
        """Raise SupersededError if another machine has resumed the run, as its backup allows."""
        if not self.record.is_copied:
            return
        if self.client.launcher(self.state.run_id) != self.record.launcher.id:
            raise SupersededError("another command has resumed this run, and records it")

    def send_points(self) -> None:
        """Send what the journal holds by now and MLflow does not."""
        points = list(self.reader.new())
        self.progress = self.progress.after(points)
        for point in points:
            if "event" in point:
                continue
            if point["step"] > self.state.uploaded.get(_kind(point), -1):
                self.unsent.append(point)
        while self.unsent:
            metrics: list[Value] = []
            num_points, rate = 0, self.rate
            uploaded = dict(self.state.uploaded)
            for point in self.unsent:
                new = list(values_of(_without_rate(point, rate)))
                if metrics and len(metrics) + len(new) > BATCH:
                    break
                metrics += new
                num_points += 1
                uploaded[_kind(point)] = point["step"]
                rate = point["train"]["learning_rate"] if "train" in point else rate
            self._refuse_superseded()
            self.client.log_metrics(self.state.run_id, metrics)
            del self.unsent[:num_points]
            self.rate = rate
            self.save(uploaded=uploaded)

    def describe(self, ended: Ended | None = None) -> None:
        """Bring the run's description up to date, now and then while it trains."""
        now = time.monotonic()
        if ended is None and now - self.described_at < DESCRIBE_SECONDS:
            return
        self.described_at = now
        proof = self.client.find_proof(self.state.experiment_id, self.record.tags)
        text = describe(self.record, self.progress, self.state, ended, proof)
        if text != self.described:
            self.client.set_tags(self.state.run_id, {NOTE: text})
            self.described = text

    def finish(self, ended: Ended) -> None:
        """The rest of the curve, the model of a finished run, and the run's status."""
        self.send_points()
        self._refuse_superseded()
        run_id = self.state.run_id
        tags = _tags(self.progress.starts)
        if ended.state == "finished":
            done = Done.read(self.run.done)
            if not self.state.model_uri:
                self._log_model(done.best.step if done.best else done.steps)
            if best := done.best:
                metrics = list(values("best", best.metrics, done.time, best.step))
                self.client.log_model_metrics(
                    run_id, self.state.model_id, metrics, self.record.data
                )
            if done.first_difference is not None:
                tags["pipeline.first_difference"] = str(done.first_difference)
        if ended.reason:
            tags[ERROR] = ended.reason
        if self.progress.notes:
            tags[WARNING] = "; ".join(self.progress.notes)
        self.client.set_tags(run_id, tags)
        self.describe(ended)
        for path in (self.run.nonfinite, *self.run.tracebacks):
            if path.exists():
                self.client.log_file(run_id, path)
        self.client.end_run(run_id, ended.state)
        self.save(complete=True, error="")

    def _log_model(self, step: int) -> None:
        """The model, its link to the run, and beside it the metrics of the step it is of.

        It is created once, and noted: another try continues with it.
        """
        from pipeline.tracking.model import log_model

        run_id = self.state.run_id
        if not self.state.model_id:
            self.save(model_id=self.client.create_model(run_id))
        uri = log_model(self.run, self.state.model_id, self.record)
        self.client.link_model(run_id, self.state.model_id, step)
        points = [point for point in Reader(self.run.journal).new() if point["step"] == step]
        metrics = [value for point in points for value in values_of(point)]
        self.client.log_model_metrics(run_id, self.state.model_id, metrics, self.record.data)
        self.save(model_uri=uri)


def _without_rate(
    point: StepPoint | EvaluationPoint, rate: float | None
) -> StepPoint | EvaluationPoint:
    """The point without a learning rate that is still `rate`: MLflow costs 0.1 ms a value.

    Once a second, with the speed, it is told all the same.
    """
    if "validation" in point or "rows_per_second" in point["train"]:
        return point
    if point["train"]["learning_rate"] != rate:
        return point
    train = {name: value for name, value in point["train"].items() if name != "learning_rate"}
    return {**point, "train": train}


def _kind(point: StepPoint | EvaluationPoint) -> str:
    return "train" if "train" in point else "validation"


def _tags(starts: Sequence[Start]) -> dict[str, str]:
    """How many workers each attempt had, and what the curve's bits depended on from where."""
    if not starts:
        return {}
    tags = {"pipeline.workers": ", ".join(str(start["workers"]) for start in starts)}
    parts: list[dict[str, Any]] = []
    for start in starts:
        if not parts or start["bits"] != parts[-1]["bits"]:
            parts.append({"after_step": start["step"], "bits": start["bits"]})
    if len(parts) > 1:
        text = json.dumps(parts)
        tags["pipeline.bits"] = text
        tags["pipeline.bits_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    return tags


def main(run: RunDir, is_alone: bool = False) -> int:
    """Upload until training has ended; 0 when the record is complete.

    Signals do not end it: `ray job stop` sends them to all processes, and the command that trains
    says when to end. `is_alone` says that there is no such command any more.
    """
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    _lower_priority()
    launcher = Record.read(run.record).launcher
    with FileLock(run.uploader_lock):  # an earlier launcher's upload ends first
        return _upload(run, launcher, is_alone)


def _upload(run: RunDir, launcher: Launcher, is_alone: bool) -> int:
    """Upload as long as `launcher` has not handed the run over to another one."""
    while _is_starting(run) and not _read_end(run, is_alone):
        time.sleep(0.1)
    uploader: Uploader | None = None
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
            uploader = uploader or Uploader(run)
            uploader.begin()
            if ended:
                uploader.finish(ended)
                return 0
            uploader.send_points()
            uploader.describe()
            if uploader.state.error:
                uploader.save(error="")
            pause = EVERY_SECONDS
        except SupersededError as error:
            assert uploader is not None
            uploader.save(error=str(error))
            return 0
        except Exception as error:  # whatever a server or disk does, training is not to feel it
            reason = _reason(error, uploader)
            if reason != printed:
                text = redact(traceback.format_exc(), environment_uri())
                print(text, file=sys.stderr, flush=True)
            printed = reason
            if uploader is not None:
                uploader.save(complete=False, error=reason[:500])
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


def _reason(error: Exception, uploader: Uploader | None) -> str:
    """What keeps MLflow from being told, where, and whether another server could be told."""
    reason = redact(str(error).partition("\n")[0] or type(error).__name__, environment_uri())
    reason = " ".join(reason.split())
    if "Max retries exceeded" in reason or "Connection aborted" in reason:
        reason = "MLflow's server does not answer"
    if uploader is None:
        return reason
    other = "" if uploader.state.run_id else "; MLFLOW_TRACKING_URI can name another"
    return f"{reason} ({uploader.state.tracking_uri}{other})"


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
    sys.exit(main(RunDir(Path(sys.argv[1])), ALONE in sys.argv[2:]))
