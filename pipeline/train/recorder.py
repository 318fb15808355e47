"""What the first worker records of a run: its curve, checkpoints, their copy, and the result."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.data.loader import StepBatch
from pipeline.distributed import comm
from pipeline.errors import NonFiniteError, RunError
from pipeline.train import determinism, files
from pipeline.train.checkpoint import Checkpoints
from pipeline.train.curve import Journal
from pipeline.train.job import Job
from pipeline.train.lease import Lease
from pipeline.train.mirror import FAULTS, Mirror, reason
from pipeline.train.state import TrainState
from pipeline.train.step import Requests, StepLosses
from pipeline.train.weights import save_weights, weights_sha256

ASK_SECONDS = 0.2
SPEED_SECONDS = 1.0
LONGEST_COPY_SECONDS = 60.0
"""That the end of a run waits for its copy."""
MOST_ROWS = 100
"""Rows of a skipped step that are named in the journal."""


class Follower:
    """Records nothing: what all workers do but the first, whose `Recorder` does."""

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        pass

    def requests(self, step: int) -> Requests:
        """What to ask of all workers in the step with which `step` steps are done."""
        return Requests()

    def log_step(self, state: TrainState, batch: StepBatch, losses: StepLosses) -> None:
        """One step's losses."""

    def log_evaluation(
        self, state: TrainState, values: dict[str, float | None], notes: list[str]
    ) -> None:
        """Loss and metrics of the validation rows, and notes on what they do not show."""

    def log_nonfinite(self, error: NonFiniteError) -> None:
        """A step that is not finite, with all rows that it comes from."""

    def save(self, state: TrainState, is_last: bool) -> None:
        """A checkpoint; `is_last` if the run ends with it."""

    def finish(self, state: TrainState) -> None:
        """The end of the run."""


class Recorder(Follower):
    """Records the journal, checkpoints, and the end of the run."""

    def __init__(
        self, job: Job, folder: Path, first_step: int, last_step: int, lease: Lease
    ) -> None:
        self.job, self.folder, self.last_step, self.lease = job, folder, last_step, lease
        self._asked, self._stopping = 0.0, False
        self._num_rows, self._since = 0, time.perf_counter()
        exact = job.spec.training.microbatch_size is not None
        self.journal = Journal(folder / files.CURVE, first_step, exact, lease.check)
        self.checkpoints = Checkpoints(
            folder, job.spec.checkpoint, determinism.identity(job), first_step
        )
        self.copies = Copies(folder, self.checkpoints, lease.check)
        files.folder_to_disk(folder)  # the names of both
        failure = folder / files.FAILURE
        after = {"after": failure.read_text()} if failure.exists() else {}
        failure.unlink(missing_ok=True)
        now = determinism.fingerprint(job.spec)
        before = self.journal.bits or now
        changed = [f"{k} {old} -> {now.get(k)}" for k, old in before.items() if now.get(k) != old]
        if first_step and changed:
            text = (
                f"{', '.join(changed)}: after step {first_step} the curve agrees with that of an "
                "undisturbed run to rounding only"
            )
            self.journal.event(first_step, "bits", text=text)
        self.journal.starts.append(comm.num_workers())
        self.journal.event(
            first_step, "start", attempt=len(self.journal.starts),
            workers=comm.num_workers(), reached=self.journal.reached, bits=now, **after,
        )  # fmt: skip

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """What led up to an error is in the journal: it is looked at most of all."""
        if kind is not None:
            with contextlib.suppress(OSError, RunError):  # the error itself is to be heard of
                self.journal.flush()

    def requests(self, step: int) -> Requests:
        """Whether to stop is asked of the disk now and then; to save, when a checkpoint is due."""
        now = time.monotonic()
        if now - self._asked > ASK_SECONDS:
            self._asked, self._stopping = now, (self.folder / files.STOP).exists()
        return Requests(stop=self._stopping, save=self.checkpoints.is_due(step))

    def log_step(self, state: TrainState, batch: StepBatch, losses: StepLosses) -> None:
        """One step's point, with the speed in it once a second and at the end."""
        labels = [term.label for term in state.objective.terms]
        train = {
            "loss": losses.total, "learning_rate": state.learning_rate,
            "gradient_norm": losses.gradient_norm,
        }  # fmt: skip
        self._num_rows += batch.num_rows
        seconds = time.perf_counter() - self._since
        if seconds >= SPEED_SECONDS or state.step == self.last_step:
            train["rows_per_second"] = self._num_rows / seconds
            self._num_rows, self._since = 0, time.perf_counter()
        point: dict[str, Any] = {
            "step": state.step, "epoch": state.step / self.job.steps_per_epoch,
            "terms": dict(zip(labels, losses.terms, strict=True)), "train": train,
        }  # fmt: skip
        if losses.fault is not None:
            fault = losses.fault.with_rows(batch.rows)
            self.log_nonfinite(fault)
            point["skipped"] = list(fault.rows[:MOST_ROWS])
        self.journal.write(point)

    def log_evaluation(
        self, state: TrainState, values: dict[str, float | None], notes: list[str]
    ) -> None:
        """One evaluation's point."""
        epoch = state.step / self.job.steps_per_epoch
        point = {"step": state.step, "epoch": epoch, "validation": values}
        self.journal.write(point | ({"said": notes} if notes else {}))

    def log_nonfinite(self, error: NonFiniteError) -> None:
        """Keep it, with all of its rows, in a file of the run's folder."""
        facts = {
            "step": error.step, "gradient_norm": str(error.gradient_norm),
            "losses": {name: str(value) for name, value in error.terms.items()},
            "microbatches": error.microbatches, "rows": error.rows,
        }  # fmt: skip
        files.write_json(self.folder / files.NONFINITE, facts)

    def save(self, state: TrainState, is_last: bool) -> None:
        """Save a checkpoint; what leads up to it is in the journal before."""
        self.journal.flush()
        self.checkpoints.save(state.step, state.snapshot(), self._before_checkpoint)
        if said := self.copies.update():
            self.journal.event(state.step, "copy", text=said)
        if is_last:
            self.checkpoints.wait()
            if said := self.copies.update(wait=True):
                self.journal.event(state.step, "copy", text=said)
            self.journal.event(state.step, "stop")

    def _before_checkpoint(self) -> None:
        """The curve up to a checkpoint is on the disk before it counts."""
        self.journal.to_disk()
        self.lease.check()

    def finish(self, state: TrainState) -> None:
        """Weights, then the marker that says the run is complete."""
        self.checkpoints.wait()
        self.journal.close()
        self.copies.before_result()
        weights = state.best_weights
        save_weights(weights, self.folder / files.WEIGHTS, self.lease.check)
        done = {
            "steps": state.step,
            "time": int(1000 * time.time()),
            "weights_sha256": weights_sha256(weights),
            "files": {n: files.sha256(self.folder / n) for n in (files.CURVE, files.WEIGHTS)},
            "best": state.best.said if state.best else None,
            "workers": self.journal.starts,
            "first_difference": self.journal.first_difference,
        }
        files.write_json(self.folder / files.DONE, done, self.lease.check)
        self.copies.result()


class Copies:
    """Keeps the run's copy up to date, in a thread; what fails is tried again with the next one."""

    def __init__(
        self, folder: Path, checkpoints: Checkpoints, may_write: Callable[[], None]
    ) -> None:
        settings = checkpoints.settings
        self.folder, self._checkpoints, self._may_write = folder, checkpoints, may_write
        self._mirror = Mirror(settings.copy_to, folder.name) if settings.copy_to else None
        self._launcher = _launcher(folder) if self._mirror else None
        self._thread: threading.Thread | None = None
        self._pushed: Path | None = None
        self._fault, self._said = "", ""
        self._lost: RunError | None = None

    def update(self, wait: bool = False) -> str:
        """Copy the checkpoint being written, once it is; what is to be said of the last copy.

        An earlier copy that is still on its way is left to end first.

        Raises RunError when a command on another machine goes on with the run.
        """
        if self._mirror is None:
            return ""
        if wait and self._thread is not None:
            self._thread.join(LONGEST_COPY_SECONDS)
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._push, daemon=True)
            self._thread.start()
        if wait:
            self._thread.join(LONGEST_COPY_SECONDS)
            if self._thread.is_alive():
                self._fault = f"the run's copy to {self._mirror.shown} has not ended yet"
        if self._lost:
            raise self._lost
        is_new, self._said = self._fault != self._said, self._fault
        return self._fault if is_new else ""

    def _push(self) -> None:
        assert self._mirror is not None
        try:
            self._checkpoints.settle()
            self._may_write()
            place = self._checkpoints.written
            if place and place != self._pushed:
                self._look(self._mirror)
                keep = self._checkpoints.settings.keep
                self._mirror.push(place, self.folder / files.CURVE, keep)
                self._pushed = place
            self._fault = ""
        except (*FAULTS, RunError) as error:
            self._fault = f"the run cannot be copied to {self._mirror.shown}: {reason(error)}"

    def _look(self, mirror: Mirror) -> None:
        """Raise RunError, and remember it, if another command has put its record there."""
        now = mirror.launcher()
        if now and now != self._launcher:
            self._lost = RunError(
                f"process {now['pid']} on {now['host']} goes on with this run from its copy in "
                f"{mirror.shown}; this command writes nothing more"
            )
            raise self._lost

    def before_result(self) -> None:
        """Let the last copy end. Raises RunError when another machine goes on with the run."""
        if self._mirror is None:
            return
        if self._thread is not None:
            self._thread.join(LONGEST_COPY_SECONDS)
        with contextlib.suppress(*FAULTS):  # a store that is down says nothing
            self._look(self._mirror)

    def result(self) -> None:
        """Copy the result of a finished run; where that fails, the run's own folder has it."""
        if self._mirror is None:
            return
        with contextlib.suppress(*FAULTS):
            self._mirror.push_result(self.folder)


def _launcher(folder: Path) -> Any:
    """The command that started this run last."""
    try:
        return files.read_json(folder / files.RECORD).get("launcher")
    except FileNotFoundError:  # workers without a command
        return None
