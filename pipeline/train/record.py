"""What the first worker writes of a run: its journal, checkpoints, their copy, and the result."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import RunError
from pipeline.train import bits, checkpoint, files, reduce
from pipeline.train.best import Best
from pipeline.train.checkpoint import Checkpoints
from pipeline.train.curve import Journal
from pipeline.train.job import Job
from pipeline.train.lease import Lease
from pipeline.train.mirror import FAULTS, Mirror, reason
from pipeline.train.step import Losses
from pipeline.train.weights import save_weights, weights_sha256

ASK_SECONDS = 0.2
SPEED_SECONDS = 1.0
LONGEST_COPY_SECONDS = 60.0
"""That the end of a run waits for its copy."""


class Record:
    """What the first worker writes: the journal, checkpoints, and the end of the run."""

    def __init__(
        self, job: Job, folder: Path, first_step: int, lease: Lease, best: Best | None = None
    ) -> None:
        self.job, self.folder, self.lease, self.best = job, folder, lease, best
        self._asked, self._stopping = 0.0, False
        self._num_rows, self._since = 0, time.perf_counter()
        exact = job.spec.training.microbatch_size is not None
        self.journal = Journal(folder / files.CURVE, first_step, exact, lease.check)
        self.checkpoints = Checkpoints(folder, job.spec.checkpoint, bits.identity(job), first_step)
        self.copies = Copies(folder, self.checkpoints, lease.check)
        files.folder_to_disk(folder)  # the names of both
        failure = folder / files.FAILURE
        after = {"after": failure.read_text()} if failure.exists() else {}
        failure.unlink(missing_ok=True)
        now = bits.fingerprint(job.spec)
        before = self.journal.bits or now
        changed = [f"{k} {old} -> {now.get(k)}" for k, old in before.items() if now.get(k) != old]
        if first_step and changed:
            text = (
                f"{', '.join(changed)}: after step {first_step} the curve agrees with that of an "
                "undisturbed run to rounding only"
            )
            self.journal.event(first_step, "bits", text=text)
        self.journal.starts.append(reduce.num_workers())
        self.journal.event(
            first_step, "start", attempt=len(self.journal.starts),
            workers=reduce.num_workers(), reached=self.journal.reached, bits=now, **after,
        )  # fmt: skip

    def __enter__(self) -> Record:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """What led up to an error is in the journal: it is looked at most of all."""
        if kind is not None:
            with contextlib.suppress(OSError, RunError):  # the error itself is to be heard of
                self.journal.flush()

    def write(self, point: dict[str, Any], num_rows: int, is_last: bool) -> None:
        """One step's point, with the speed in it once a second and at the end."""
        self._num_rows += num_rows
        seconds = time.perf_counter() - self._since
        if seconds >= SPEED_SECONDS or is_last:
            point["train"]["rows_per_second"] = self._num_rows / seconds
            self._num_rows, self._since = 0, time.perf_counter()
        self.journal.write(point)

    def write_evaluation(
        self, step: int, epoch: float, values: dict[str, float | None], bound: torch.nn.Module,
        said: list[str],
    ) -> None:  # fmt: skip
        """Loss and metrics of the validation rows after `step` steps, and who is best so far.

        And what is `said` of them, where their values do not show it.
        """
        point = {"step": step, "epoch": epoch, "validation": values}
        self.journal.write(point | ({"said": said} if said else {}))
        if self.best:
            self.best.look(step, values, bound)

    def is_stopping(self) -> bool:
        """Whether the run is to end after this step; asked of the disk now and then."""
        now = time.monotonic()
        if now - self._asked > ASK_SECONDS:
            self._asked, self._stopping = now, (self.folder / files.STOP).exists()
        return self._stopping

    def is_due(self, step: int) -> bool:
        """Whether it is time for a checkpoint after `step` steps."""
        return self.checkpoints.is_due(step)

    def save(
        self, step: int, bound: torch.nn.Module, optimizer: torch.optim.Optimizer,
        num_skipped: int, is_last: bool,
    ) -> None:  # fmt: skip
        """Save a checkpoint; what leads up to it is in the journal before."""
        self.journal.flush()
        state = checkpoint.state_of(bound, optimizer, num_skipped)
        best = self.best.kept if self.best else None
        self.checkpoints.save(step, state, self._before_checkpoint, best)
        if said := self.copies.update():
            self.journal.event(step, "copy", text=said)
        if is_last:
            self.checkpoints.wait()
            if said := self.copies.update(wait=True):
                self.journal.event(step, "copy", text=said)
            self.journal.event(step, "stop")

    def _before_checkpoint(self) -> None:
        """The curve up to a checkpoint is on the disk before it counts."""
        self.journal.to_disk()
        self.lease.check()

    def finish(self, bound: torch.nn.Module, num_steps: int) -> None:
        """Weights, then the marker that says the run is complete."""
        self.checkpoints.wait()
        self.journal.close()
        self.copies.before_result()
        kept = self.best.kept if self.best else None
        weights = kept["weights"] if kept else bound.state_dict()
        save_weights(weights, self.folder / files.WEIGHTS, self.lease.check)
        done = {
            "steps": num_steps,
            "time": int(1000 * time.time()),
            "weights_sha256": weights_sha256(weights),
            "files": {n: files.sha256(self.folder / n) for n in (files.CURVE, files.WEIGHTS)},
            "best": self.best.said if self.best else None,
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


def point_of(
    step: int, per_epoch: int, labels: list[str], losses: Losses, rate: float
) -> dict[str, Any]:
    """One step's line of the journal."""
    return {
        "step": step,
        "epoch": step / per_epoch,
        "terms": dict(zip(labels, losses.terms, strict=True)),
        "train": {
            "loss": losses.total,
            "learning_rate": rate,
            "gradient_norm": losses.gradient_norm,
        },
    }
