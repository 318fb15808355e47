"""The loop over a job's batches, the same on one worker and on many."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pipeline import tracebacks
from pipeline.data.batch import Batch
from pipeline.data.dataset import Dataset
from pipeline.data.loader import Loader, Partition, StepBatch
from pipeline.data.streaming import Streamed
from pipeline.distributed import comm
from pipeline.errors import NonFiniteError
from pipeline.losses.objective import Objective
from pipeline.losses.terms import check_targets
from pipeline.rundir import RunDir, checkpoint
from pipeline.rundir.journal import Journal
from pipeline.rundir.lease import Lease
from pipeline.rundir.records import Numbers
from pipeline.rundir.remote_worker import WorkerSide
from pipeline.rundir.repair import repair
from pipeline.spec.sections import Decision
from pipeline.telemetry.flops import flops_per_row, peak_flops
from pipeline.telemetry.stopwatch import Phase, Stopwatch
from pipeline.telemetry.throughput import Throughput
from pipeline.train import determinism, drift
from pipeline.train.baselines import choose_baselines
from pipeline.train.drains import Notices
from pipeline.train.evaluate import Evaluation, evaluate, rows_at_once
from pipeline.train.job import Job
from pipeline.train.recorder import NullRecorder, RunRecorder
from pipeline.train.state import TrainState
from pipeline.train.threshold import choosers, decide

CPU = torch.device("cpu")
MAX_ROWS = 8
"""Of a step, that an error names."""


def train(
    job: Job,
    run: RunDir,
    before_step: Callable[[int], None] = lambda step: None,
    num_steps: int | None = None,
    is_own_process: bool = False,
    device: torch.device = CPU,
    notices: Notices | None = None,
    remote: WorkerSide | None = None,
) -> None:
    """Train the job from the run's newest checkpoint, or the start; ends with the weights.

    With `num_steps` it ends after these, and an evaluation of them. `before_step` is told of each,
    counted from 0. `is_own_process` says that this process does nothing else, and may be killed by
    its successor. `notices` are told to the user as they come. `remote` is where the run is, if
    its folder is a copy only.
    """
    if run.is_intact:
        return
    last_step = min(num_steps or job.num_steps, job.num_steps)
    settings = job.spec.training
    state = TrainState.create(job, device)
    lease: Lease | None = None
    skipped: list[str] = []
    if comm.rank() == 0 and remote:
        lease, skipped = remote.insist(
            lambda: remote.take(determinism.identity(job), is_own_process)
        )
    elif comm.rank() == 0:
        lease = Lease.take(run, is_own_process)
    _resume(job, run, state, lease, last_step, remote, skipped)
    stopwatch = Stopwatch.on(device)
    throughput = _throughput(job, stopwatch, device)
    recorder = NullRecorder()
    if lease:
        recorder = RunRecorder(job, run, state.step, last_step, lease, throughput, notices, remote)
    partition = Partition(settings.microbatch_size, comm.rank(), comm.num_workers())
    count = _choose_counter(job, state.objective)
    steps = range(state.step, state.step if state.is_done(last_step) else last_step)
    loader = Loader(job.train, job.sampler(), count, steps, partition, device.type == "cuda")
    is_exact = settings.microbatch_size is not None
    rows = job.train.opened(str(run.path.resolve()))
    with determinism.deterministic(is_exact), rows, loader, recorder:
        _train_steps(job, state, _announce(loader, before_step), recorder, last_step, stopwatch)
        decision, test = _conclude(job, state, recorder)
    if state.is_done(last_step):
        recorder.finish(state, decision, test)
        comm.barrier()


def _train_steps(
    job: Job,
    state: TrainState,
    batches: Iterable[StepBatch],
    recorder: NullRecorder,
    last_step: int,
    stopwatch: Stopwatch,
) -> None:
    """One step a batch, with evaluations and checkpoints where they are due; or until a stop."""
    settings, lap = job.spec.training, stopwatch.lap
    if state.step == 0 and job.is_evaluated(0, last_step):
        _evaluate(job, state, recorder, last_step, lap)
    stopwatch.restart()
    for batch in batches:
        lap("waiting_for_rows")
        requests = recorder.requests(batch.step + 1)
        with _explain_errors(job, state, batch, recorder):
            losses = state.train(batch, settings, requests, lap)
        recorder.log_step(state, batch, losses)
        lap("recording")
        if job.is_evaluated(state.step, last_step):
            _evaluate(job, state, recorder, last_step, lap)
            lap("recording")
        if state.step % job.steps_per_evaluation == 0:
            recorder.count_time(state)
            state.end_by_clock(settings)
        is_done = state.is_done(last_step)
        if any(losses.requests) or is_done:
            drift.refuse(state.objective, state.optimizer, state.gradients.buffers, state.step)
        if any(losses.requests):
            recorder.save(state, is_last=losses.requests.stop)
            lap("checkpoint")
        if losses.requests.stop or is_done:
            return


def _throughput(job: Job, stopwatch: Stopwatch, device: torch.device) -> Throughput:
    """What measures the run's speed, with the FLOPs of a row counted once.

    On every worker: whatever a model keeps outside of itself, it is the same on all.
    """
    objective, peak = job.objective(), None
    if device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(device), objective.precision)
    flops = flops_per_row(objective, job.trial, device)
    return Throughput(stopwatch, flops, peak and peak * comm.num_workers())


def _evaluate(
    job: Job,
    state: TrainState,
    recorder: NullRecorder,
    last_step: int,
    lap: Callable[[Phase], None],
) -> None:
    """Loss and metrics of the validation rows, and whether the weights are the best so far."""
    assert job.validation is not None
    settings = job.spec.training
    is_kept = bool(settings.best_by or settings.stop) or state.step == last_step
    with tracebacks.noting(f"in the evaluation after step {state.step}"), state.averaged():
        evaluation = _evaluate_rows(job, state, job.validation, state.step == 0, is_kept)
        becomes_model = state.step > 0
        if state.best:
            becomes_model = state.best.update(state.step, evaluation.values, state.objective)
    lap("evaluation")
    recorded = recorder.log_evaluation(state, evaluation)
    if state.early_stop:
        state.early_stop.update(state.step, recorded)
    if state.plateau:
        state.plateau.update(state.step, recorded)
    if evaluation.kept and becomes_model:
        recorder.save_predictions(state, evaluation)


def _conclude(
    job: Job, state: TrainState, recorder: NullRecorder
) -> tuple[Numbers, Evaluation | None]:
    """Thresholds, then loss and metrics of the test rows, once the job's training is over."""
    metric = job.spec.training.threshold
    is_over = state.is_done(job.num_steps)
    if not is_over or not (job.test is not None or isinstance(metric, str)):
        return {}, None
    recorder.save_end(state)
    state.become_model()
    decision = _decide(job, state, metric) if isinstance(metric, str) else {}
    if job.test is None:
        return decision, None
    with tracebacks.noting("in the evaluation of the test rows"):
        return decision, _evaluate_rows(job, state, job.test, with_baselines=True)


def _decide(job: Job, state: TrainState, metric: Decision) -> Numbers:
    """Choose thresholds on the validation rows; each with the metric that it has there."""
    assert job.validation is not None
    objective, device = state.objective, state.gradients.seeds.device
    size = rows_at_once(objective, job.spec.training)
    chosen = choosers(objective, metric)
    rows = np.arange(len(job.validation))
    values = evaluate(objective, job.validation, rows, size, chosen, device).values
    state.decided = decide(objective, values)
    return {one.name: values[one.name] for one in chosen}


def _evaluate_rows(
    job: Job, state: TrainState, rows: Dataset, with_baselines: bool, keep: bool = False
) -> Evaluation:
    """Loss and metrics of all rows of a split."""
    objective = state.objective
    return evaluate(
        objective,
        rows,
        np.arange(len(rows)),
        rows_at_once(objective, job.spec.training),
        state.metrics,
        state.gradients.seeds.device,
        choose_baselines(objective.terms, state.metrics, job.train) if with_baselines else (),
        keep,
    )


def _resume(
    job: Job,
    run: RunDir,
    state: TrainState,
    lease: Lease | None,
    last_step: int,
    remote: WorkerSide | None,
    problems: list[str],
) -> None:
    """Bring every worker's state to the newest checkpoint that is intact, if there is one.

    The curve gets the `problems` that there are already.
    """
    step = 0
    if lease is not None:
        run.done.unlink(missing_ok=True)  # it is not intact, or this would not be asked
        is_evaluated = partial(job.is_evaluated, last_step=last_step)
        num_steps, damage = repair(run.journal, is_evaluated, lease.check)
        if remote:
            remote.begin_curve()
        step, skipped = checkpoint.newest(run, determinism.identity(job), num_steps)
        if problems := [text for text in (*problems, damage, *skipped) if text]:
            journal = Journal(run.journal, lease.check)
            for text in problems:
                journal.event({"step": step, "event": "damage", "text": text})
            journal.close()
    step = comm.from_first(step)
    if step:  # the first worker reads it for all, so that they do not all load the storage
        saved = checkpoint.load(run, step) if comm.rank() == 0 else None
        state.restore(comm.tensors_from_first(saved), step)


def _announce(
    batches: Iterable[StepBatch], before_step: Callable[[int], None]
) -> Iterator[StepBatch]:
    for batch in batches:
        before_step(batch.step)
        yield batch


def _choose_counter(job: Job, objective: Objective) -> Callable[[Batch], Tensor]:
    """What the losses count in a batch; of rows that nobody has looked at, they are checked."""

    def checked(batch: Batch) -> Tensor:
        check_targets(objective.terms, batch)
        return objective.denominators(batch)

    return checked if isinstance(job.train, Streamed) else objective.denominators


@contextmanager
def _explain_errors(
    job: Job, state: TrainState, batch: StepBatch, recorder: NullRecorder
) -> Iterator[None]:
    """Errors of a step name it, and one of a number that is not finite the rows it comes from."""
    try:
        yield
    except NonFiniteError as error:
        fault = error.with_rows(batch.rows)
        allowed = job.spec.training.skip_nonfinite
        recorder.log_nonfinite(fault)
        if allowed:
            fault.add_note(f"{state.num_skipped} of {allowed} are skipped already")
        raise fault from None
    except Exception as error:  # a user's components can fail in any way
        rows = [row for index, _ in batch.microbatches for row in batch.rows[index].tolist()]
        shown = ", ".join(map(str, rows[:MAX_ROWS])) + (", ..." if len(rows) > MAX_ROWS else "")
        error.add_note(f"in step {batch.step + 1}, with training rows {shown} (counted from 0)")
        raise
