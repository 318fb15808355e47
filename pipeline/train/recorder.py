"""What the first worker records of a run: curve, checkpoints, their backup, and the result."""

from __future__ import annotations

import contextlib
import time
from typing import Self

from pipeline.data.loader import StepBatch
from pipeline.distributed import comm
from pipeline.errors import NonFiniteError, RunError
from pipeline.files.atomic import replacing, sync_folder
from pipeline.models.lora import merged
from pipeline.rundir import RunDir
from pipeline.rundir.backup import Backups, BackupThread
from pipeline.rundir.checkpoint import Checkpoints
from pipeline.rundir.journal import Journal, nonfinite_to_none
from pipeline.rundir.layout import facts_of
from pipeline.rundir.lease import Lease
from pipeline.rundir.records import (
    Done,
    EvaluationPoint,
    NonFinite,
    Numbers,
    Scores,
    Start,
    StepPoint,
)
from pipeline.rundir.remote_worker import StorageThread, WorkerSide
from pipeline.telemetry.norms import parameter_norms
from pipeline.telemetry.throughput import Throughput
from pipeline.train import determinism, predictions
from pipeline.train.drains import Notices
from pipeline.train.evaluate import Evaluation
from pipeline.train.importance import permutation_importance
from pipeline.train.job import Job
from pipeline.train.state import TrainState
from pipeline.train.step import Requests, StepLosses
from pipeline.train.term_metrics import not_better
from pipeline.train.weights import save_weights, take_weights, weights_sha256

ASK_SECONDS = 0.2
"""Between looks for the file that asks the workers to stop."""
MAX_ROWS = 100
"""Rows of a skipped step that are named in the journal."""


class NullRecorder:
    """Records nothing, as on all workers but the first, which has a `RunRecorder`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        pass

    def requests(self, step: int) -> Requests:
        """What this worker asks of all in the step that completes `step` steps."""
        return Requests()

    def count_time(self, state: TrainState) -> None:
        """Tell the state how long training has taken."""

    def log_step(self, state: TrainState, batch: StepBatch, losses: StepLosses) -> None:
        """One step's losses."""

    def log_evaluation(self, state: TrainState, evaluation: Evaluation) -> Numbers:
        """Loss and metrics of the validation rows, as the curve has them."""
        return evaluation.values

    def save_predictions(self, state: TrainState, evaluation: Evaluation) -> None:
        """The predictions of an evaluation whose weights become the model."""

    def log_nonfinite(self, error: NonFiniteError) -> None:
        """A step that is not finite, with all rows that it comes from."""

    def save(self, state: TrainState, is_last: bool) -> None:
        """A checkpoint; `is_last` if the run ends with it."""

    def save_end(self, state: TrainState) -> None:
        """A checkpoint that is on the disk: all steps are done, and what follows may fail."""

    def finish(self, state: TrainState, decision: Numbers, test: Evaluation | None) -> None:
        """The end of the run, with the thresholds and what the test rows gave."""


class RunRecorder(NullRecorder):
    """Records the journal, checkpoints, and the end of the run."""

    def __init__(
        self,
        job: Job,
        run: RunDir,
        first_step: int,
        last_step: int,
        lease: Lease,
        throughput: Throughput,
        notices: Notices | None = None,
        remote: WorkerSide | None = None,
    ) -> None:
        self.job = job
        self.notices = notices or Notices()
        self.run = run
        self.lease = lease
        self.throughput = throughput
        self.first_step, self.last_step = first_step, last_step
        self._looked, self._is_stopping = 0.0, False
        self._counted = time.monotonic()
        settings = job.spec.checkpoint
        exact = job.spec.training.microbatch_size is not None
        self.journal = Journal(run.journal, lease.check, first_step, exact)
        self.checkpoints = Checkpoints(run, settings, determinism.identity(job), first_step)
        backup = Backups(settings.copy_to).of(run.name) if settings.copy_to else None
        self.backup = BackupThread(run, self.checkpoints, backup, lease.check)
        if remote:
            self.backup = StorageThread(remote, self.checkpoints, lease)

    def __enter__(self) -> Self:
        """This attempt at the run begins: with how many workers, and on what its bits depend."""
        self.run.checkpoints.mkdir(exist_ok=True)
        sync_folder(self.run.path)  # the names of journal and checkpoints
        now = determinism.fingerprint(self.job.spec)
        before = self.journal.bits or now
        changed = [f"{k} {old} -> {now.get(k)}" for k, old in before.items() if now.get(k) != old]
        if self.first_step and changed:
            text = (
                f"{', '.join(changed)}: after step {self.first_step} the curve agrees with that of "
                "an undisturbed run to rounding only"
            )
            self.journal.event({"step": self.first_step, "event": "bits", "text": text})
        self.journal.workers_by_attempt.append(comm.num_workers())
        start: Start = {
            "event": "start",
            "step": self.first_step,
            "attempt": len(self.journal.workers_by_attempt),
            "workers": comm.num_workers(),
            "reached": self.journal.reached,
            "bits": now,
        }
        with contextlib.suppress(FileNotFoundError):
            start["after"] = self.run.failure.read_text()
            self.run.failure.unlink()
        self.journal.event(start)
        self.backup.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """What led up to an error is in the journal: it is looked at most of all."""
        if kind is not None:
            with contextlib.suppress(OSError, RunError):  # the error itself is to be heard of
                self.journal.flush()
        self.backup.close()

    def requests(self, step: int) -> Requests:
        """Whether to stop is asked of the disk now and then; to save, when a checkpoint is due."""
        now = time.monotonic()
        if now - self._looked > ASK_SECONDS:
            self._looked, self._is_stopping = now, self.run.stop.exists()
            self.backup.refuse_superseded()
        is_due = self.checkpoints.is_due(step)
        while not self.notices.empty():
            notice = self.notices.get()
            if notice.text:
                self.journal.event({"step": step - 1, "event": "nodes", "text": notice.text})
            is_due |= notice.saves
        return Requests(stop=self._is_stopping, save=is_due)

    def count_time(self, state: TrainState) -> None:
        now = time.monotonic()
        state.seconds += now - self._counted
        self._counted = now

    def log_step(self, state: TrainState, batch: StepBatch, losses: StepLosses) -> None:
        """One step's point, with speed and shares of time every second or so and at the end."""
        labels = [term.label for term in state.objective.terms]
        train = {
            "loss": losses.total,
            "learning_rate": state.learning_rate,
            "gradient_norm": losses.gradient_norm,
        }
        point: StepPoint = {
            "step": state.step,
            "epoch": state.step / self.job.steps_per_epoch,
            "terms": dict(zip(labels, losses.terms, strict=True)),
            "train": train,
        }
        is_last = state.step == self.last_step and self.job.validation is None
        if numbers := self.throughput.step(batch.num_rows, is_last):
            point["throughput"] = numbers
        every = self.job.spec.tracking.norms_every
        if every and state.step % every.in_steps(self.job.steps_per_epoch) == 0:
            point["norms"] = nonfinite_to_none(parameter_norms(state.objective))
        if losses.nonfinite is not None:
            fault = losses.nonfinite.with_rows(batch.rows)
            self.log_nonfinite(fault)
            point["skipped"] = list(fault.rows[:MAX_ROWS])
        self.journal.write(point)

    def log_evaluation(self, state: TrainState, evaluation: Evaluation) -> Numbers:
        """One evaluation's point, with notes on what its numbers do not show."""
        point: EvaluationPoint = {
            "step": state.step,
            "epoch": state.step / self.job.steps_per_epoch,
            "validation": evaluation.values,
        }
        if evaluation.baselines:
            point["baselines"] = evaluation.baselines
        is_wanted = state.step == self.last_step or (state.step > 0 and not self.throughput.is_told)
        if is_wanted and (numbers := self.throughput.step(0, is_last=True)):
            point["throughput"] = numbers
        notes = list(evaluation.notes)
        if state.step:
            notes += not_better(state.metrics, evaluation.values, self.journal.baselines)
        if notes:
            point["notes"] = notes
        recorded = self.journal.write(point)
        assert "validation" in recorded
        return recorded["validation"]

    def save_predictions(self, state: TrainState, evaluation: Evaluation) -> None:
        """Keep them in a file of the run's folder, with where their rows come from."""
        assert self.job.origins is not None
        held_out = predictions.held_out(
            state.objective, evaluation.kept, state.step, self.job.origins
        )
        held_out.write(self.run.held_out, self.lease.check)

    def log_nonfinite(self, error: NonFiniteError) -> None:
        """Keep it, with all of its rows, in a file of the run's folder."""
        NonFinite(
            step=error.step,
            gradient_norm=str(error.gradient_norm),
            losses={name: str(value) for name, value in error.terms.items()},
            microbatches=list(error.microbatches),
            rows=list(error.rows),
        ).write(self.run.nonfinite, self.lease.check)

    def save(self, state: TrainState, is_last: bool) -> None:
        """Save a checkpoint; what leads up to it is in the journal before."""
        self.journal.flush()
        self.count_time(state)
        self.checkpoints.save(state.step, state.snapshot(), self._before_checkpoint)
        self._back_up(state.step)
        if is_last:
            self.checkpoints.wait()
            self._back_up(state.step, wait=True)
            self.journal.event({"step": state.step, "event": "stop"})

    def save_end(self, state: TrainState) -> None:
        """A checkpoint that is on the disk: all steps are done, and what follows may fail."""
        self.checkpoints.wait()
        if self.checkpoints.written != self.run.checkpoint(state.step):
            self.save(state, is_last=False)
            self.checkpoints.wait()

    def _save_importance(self, state: TrainState) -> None:
        if self.job.validation is None:
            return
        objective = state.objective
        take_weights(objective, state.model_weights)
        training, device = self.job.spec.training, state.gradients.seeds.device
        size = training.microbatch_size or training.batch_size
        if importance := permutation_importance(objective, self.job.validation, size, device):
            importance.write(self.run.importance, self.lease.check)

    def _back_up(self, step: int, wait: bool = False) -> None:
        if problem := self.backup.update(wait):
            self.journal.event({"step": step, "event": "copy", "text": problem})

    def _before_checkpoint(self) -> None:
        """The curve up to a checkpoint is on the disk before it counts."""
        self.journal.sync()
        self.lease.check()

    def finish(self, state: TrainState, decision: Numbers, test: Evaluation | None) -> None:
        """Weights, then the marker that says the run is complete."""
        self.checkpoints.wait()
        self.journal.close()
        self.backup.before_result()
        weights, is_early = state.model_weights, state.step < self.last_step
        if lora := self.job.spec.model.lora:
            weights = merged(weights, lora.rank, lora.alpha)
        with replacing(self.run.weights, self.lease.check) as file:
            save_weights(weights, file)
        self._save_importance(state)
        done = Done(
            steps=state.step,
            time=int(1000 * time.time()),
            weights_sha256=weights_sha256(weights),
            files={path.name: facts_of(path) for path in (self.run.journal, self.run.weights)},
            best=state.best.result if state.best else None,
            test=_scores(test) if test else None,
            decision=nonfinite_to_none(decision),
            ended_early=state.reason_to_end if is_early else "",
            workers=self.journal.workers_by_attempt,
            first_difference=self.journal.first_difference,
        )
        done.write(self.run.done, self.lease.check)
        self.backup.push_result()


def _scores(evaluation: Evaluation) -> Scores:
    metrics, baselines = map(nonfinite_to_none, (evaluation.values, evaluation.baselines))
    return Scores(metrics=metrics, baselines=baselines)
