"""Run a job spec: check, train on its workers, and see its record into MLflow."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import plugins, registry
from pipeline.errors import PipelineError, RunError, StoppedError, UsageError
from pipeline.launch.resources import has_cluster
from pipeline.launch.result import Result
from pipeline.redact import redact
from pipeline.spec import JobSpec, load
from pipeline.tracking.names import tracking_uri

if TYPE_CHECKING:
    from pipeline.checks.batch import Notice
    from pipeline.launch.gauges import Gauges
    from pipeline.rundir import RunDir
    from pipeline.rundir.records import Recorded, State
    from pipeline.train.assignment import Assignment
    from pipeline.train.job import Job

CHECKED = "PIPELINE_CHECKED"
"""Holds the seal of a job that was checked where it was submitted, with the same modules."""
MAX_PER_CORE = 4
RAY_STOP_SECONDS = 3.0
"""Between a SIGTERM and a SIGKILL of `ray job stop`, unless the job says otherwise."""
LEAST_STOP_SECONDS = 30.0
Tell = Callable[[str], None]


def check(
    path: str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    imports: Sequence[str] = (),
    *,
    live: Tell = lambda _: None,
    is_sent: bool = False,
) -> tuple[JobSpec, Job, list[Notice]]:
    """Everything that can be known before workers start: spec, files, columns, one real batch.

    `live` is told how far a conversion of the rows has come; a job that `is_sent` to a cluster may
    have more workers than this machine. Raises SpecError, DataError or
    ContractError, each saying what to change.
    """
    plugins.load(list(imports))
    spec = load(path, overrides)
    if not is_sent:
        refuse_too_many(spec)
    from pipeline.checks.job import check as check_job
    from pipeline.launch.initial import load_initial
    from pipeline.launch.resume import Runs
    from pipeline.train.job import prepare

    _refuse_backup(spec, Runs(spec))
    spec, initial = load_initial(spec, base_of(path))
    with threads(1):  # faster for a small batch
        job = prepare(spec, base_of(path), live, initial=initial)
        is_known = os.environ.get(CHECKED) == seal_of(job)
        return spec, job, [] if is_known else check_job(job)


def seal_of(job: Job) -> str:
    """What a check's result follows from, beside custom modules: spec, rows and versions."""
    from pipeline.train.determinism import versions

    parts = [job.spec.digest, job.fingerprint, versions()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def run(
    path: str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    imports: Sequence[str] = (),
    *,
    fresh: bool = False,
    say: Tell | None = None,
    live: Tell = lambda _: None,
    started: float | None = None,
) -> Result:
    """Train the job of `path` with dotted `overrides`, and record it in MLflow.

    A run of the same job that is not finished is resumed, and the result of one that is finished is
    returned; `fresh` starts a new one. What is trained may not have changed in between.
    `imports` are modules or files with custom losses, models, metrics, optimizers or schedules.
    `say` gets lines for the user, `live` lines of which each replaces the last. Raises the errors
    of `check`, RunError, or RecordError when only the record is missing.
    """
    started = time.time() if started is None else started

    def tell(line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # nobody reads it any more
            if say:
                say(line)

    from pipeline.launch.signals import refuse_stopped, signals_raise
    from pipeline.tracking import process

    with contextlib.ExitStack() as held:
        held.enter_context(signals_raise())
        uploader = held.enter_context(process.warming_up())
        from pipeline.launch.resume import Runs
        from pipeline.rundir.records import Done
        from pipeline.rundir.remote_command import CommandSide
        from pipeline.tracking.record import write_record

        spec, job, notices = check(path, overrides, imports, live=live)
        modules = plugins.homes(components(spec), plugins.load(list(imports)))
        runs = Runs(spec)
        if has_cluster():  # what it cannot hold is refused before there is a run
            from pipeline.launch.ray_cluster import session

            held.enter_context(session(spec))
        with runs.lock():
            folder = runs.resume_or_create(job, modules, fresh, tell)
            if not folder.is_intact:
                held.enter_context(folder.locked())
                for text in runs.recover(folder, job):
                    tell(f"note  {text}")
                if damage := folder.damage():
                    tell(f"note  {folder.name} was finished, but {damage}: its end is done again")
            is_finished = folder.is_intact
            if remote := CommandSide.of(spec.storage, folder):
                tell(f"store {remote.store.shown}; the copy on this machine is {folder.path}")
            if is_finished:
                num_workers = Done.read(folder.done).workers[-1]
                workers = f"{num_workers} worker{'s' if num_workers > 1 else ''}"
                tell(f"run   {folder.name} is finished already, on {workers}; --fresh starts anew")
            else:
                for notice in notices:
                    tell(f"note  {notice}")
                plugins.carry(modules, folder.imports)
                write_record(folder, job, modules)
                task = assignment(job, folder, modules, base_of(path))
                runs.back_up_record(folder)
        if is_finished:
            refuse_stopped()
            held.close()
            return _finish(folder, spec.storage, started, tell)
        return _train(job, task, uploader, started, tell)


def assignment(job: Job, folder: RunDir, modules: list[str], base: Path) -> Assignment:
    """What the workers of a run are told."""
    from pipeline.files.atomic import replacing
    from pipeline.launch.ray_trainer import in_process
    from pipeline.tracking.source import ray_job_id
    from pipeline.train.assignment import Assignment
    from pipeline.train.determinism import versions
    from pipeline.train.weights import save_weights

    if job.initial is not None:
        with replacing(folder.initial) as file:
            save_weights(job.initial, file)
    origins = plugins.origins(modules, folder.imports)
    here = job if in_process(job.spec) else None
    if here is None and ray_job_id() and base.is_relative_to(Path.cwd()):
        base = base.relative_to(Path.cwd())  # nodes have a Ray job's folder in different places
    record = folder.read_record()
    return Assignment(
        spec=job.spec,
        base=base,
        run=folder,
        modules=modules,
        origins=origins,
        fingerprint=job.fingerprint,
        versions=versions(),
        launcher=record.launcher.id if record else "",
        job=here,
    )


def components(spec: JobSpec) -> list[Callable[..., Any]]:
    """What the spec names in the registries."""
    named = [(registry.losses, term.name) for term in spec.loss]
    named += [(registry.models, spec.model.name), (registry.optimizers, spec.optimizer.name)]
    named += [(registry.schedules, spec.schedule.name)]
    named += [(registry.metrics, name) for name in spec.metrics or []]
    return [kind[name].build for kind, name in named]


def base_of(path: str | Path | Mapping[str, Any]) -> Path:
    """Where relative data paths of the spec start.

    A link to a job leads to its folder; a link to that folder is left as it is called, as nodes may
    have it in different places (a ConfigMap's volume has links of its own).
    """
    if isinstance(path, Mapping):
        return Path.cwd()
    job = Path(os.path.abspath(path))
    return (job.resolve() if job.is_symlink() else job).parent


def refuse_too_many(spec: JobSpec) -> None:
    """Some more workers than cores share them; very many would only stall the machine."""
    workers = spec.workers
    cores = os.cpu_count() or 1
    wanted = workers.most * workers.cpus_per_worker
    if not has_cluster() and wanted > MAX_PER_CORE * cores:
        raise UsageError(
            f"workers: {workers.most} x {workers.cpus_per_worker:g} CPUs on a machine with "
            f"{cores} cores, at most {MAX_PER_CORE * cores}; use a cluster, or fewer"
        )


def _refuse_backup(spec: JobSpec, runs: Any) -> None:
    """MLflow's address must be one, an object store reachable, and a backup somewhere else."""
    tracking_uri(runs.storage)
    if runs.uri:
        runs.backups.numbers(runs.slug)
    uri = spec.checkpoint.copy_to
    if uri is None:
        return
    if "://" not in uri and Path(uri).expanduser().resolve() == runs.storage:
        raise UsageError(f"checkpoint.copy_to: {uri} is `storage` itself; give another folder")
    runs.backups.numbers(runs.slug)


@contextlib.contextmanager
def threads(num_threads: int) -> Iterator[None]:
    """Torch's threads of one operation, and afterwards the caller's own setting again."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _finish(folder: RunDir, storage: str, started: float, tell: Tell) -> Result:
    """The result of a run that is finished; what MLflow still lacks is uploaded."""
    from pipeline.launch.signals import collect_signals
    from pipeline.rundir.curve_end import EndReader
    from pipeline.rundir.remote_command import CommandSide
    from pipeline.tracking import process

    recorded, remote = folder.read_recorded(), CommandSide.of(storage, folder)
    if not recorded.complete or not recorded.model_uri:
        with folder.locked(), collect_signals() as signals:
            recorded = process.wait(process.start(folder, process.ALONE), folder, tell, signals)
        if remote:
            remote.keep_recorded()
    return Result.of(folder, recorded, EndReader(folder.journal, started).read_end(), started)


def _train(
    job: Job, task: Assignment, uploader: subprocess.Popen[bytes], started: float, tell: Tell
) -> Result:
    """Train the job in its folder, from the start or from where it was."""
    from pipeline.launch.progress import Progress
    from pipeline.launch.ray_trainer import fit, in_process
    from pipeline.launch.signals import begin_nothing_more, collect_signals, signals_raise
    from pipeline.rundir.curve_end import EndReader
    from pipeline.rundir.records import Ended
    from pipeline.rundir.remote_command import CommandSide
    from pipeline.tracking import process
    from pipeline.tracking.source import ray_job_id

    spec, folder = job.spec, task.run
    least, most = spec.workers.least, spec.workers.most
    num_workers = str(most) if least == most else f"{least} to {most}"
    s = "" if most == 1 else "s"
    where = "in this process" if in_process(spec) else f"on {num_workers} Ray worker{s}"
    tell(f"run   {folder.name}, {job.num_rows:,} rows{_streamed(job)} {where}")
    seconds = float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", RAY_STOP_SECONDS))
    if ray_job_id() and seconds < LEAST_STOP_SECONDS:
        tell(
            f"note  Ray kills this job {seconds:g} s after it is told to stop, which may cut a "
            "checkpoint off: RAY_JOB_STOP_WAIT_TIME_S in the job's env_vars gives it more"
        )
    waiting = "" if in_process(spec) else f"starting {num_workers} Ray worker{s}"
    reader = EndReader(folder.journal, started)
    list(reader.new())  # what an earlier command has shown
    progress = Progress(
        reader,
        job.num_steps,
        job.steps_per_epoch,
        job.rows_per_epoch,
        lambda: process.trouble(folder),
        waiting,
        _gauges(job, folder) if has_cluster() else None,
    )
    failure: BaseException | None = None
    with (
        collect_signals() as signals
    ):  # that come when training has ended: they cut the recording off
        uploading = process.hand_over(uploader, folder)
        try:
            with signals_raise(), progress, threads(spec.workers.threads):
                if signals:
                    raise StoppedError(signals.pop())
                fit(task, tell=progress.wait_for, note=progress.note)
        except (KeyboardInterrupt, Exception) as error:
            failure = error
        if folder.is_finished:
            failure = None  # what came after that undoes nothing
        elif failure is None:
            failure = RunError(f"the workers ended without a result in {folder.path}")
        state = _state(failure)
        reason = redact(str(failure) or repr(failure)) if state == "failed" else ""
        ended = Ended(state=state, reason=reason)
        recorded = process.end(uploading, folder, ended, tell, signals)
        begin_nothing_more(signals)
        if remote := CommandSide.of(spec.storage, folder):
            remote.keep_recorded()
    if failure is not None:
        _tell_failure(failure, state, folder, recorded, tell)
        raise failure
    result = Result.of(folder, recorded, reader.read_end(), started)
    for note in result.notes:
        tell(f"note  {note}")
    if spec.training.best_by and result.best is None:
        tell(f"note  no evaluation had a {spec.training.best_by}: the model has the last weights")
    return result


def _gauges(job: Job, folder: RunDir) -> Gauges:
    from pipeline.launch.gauges import Gauges

    rows_per_step = job.rows_per_epoch / job.steps_per_epoch
    return Gauges(folder, job.spec.name, job.num_steps, rows_per_step)


def _tell_failure(
    failure: BaseException, state: State, folder: RunDir, recorded: Recorded, tell: Tell
) -> None:
    """What is kept of a run that ended without a result, and where."""
    if isinstance(failure, PipelineError):
        failure.run = {
            "storage": str(folder.path),
            "run_id": recorded.run_id or None,
            "tracking_uri": recorded.tracking_uri or None,
        }
    if state == "failed":
        tell(f"kept  {folder.path}")
    if recorded.run_id:
        tell(f"mlflow run {recorded.run_id} ({state}) in {recorded.tracking_uri}")
    if not recorded.complete:
        why = recorded.error or "another command has resumed this run, and records it"
        tell(f"note  MLflow has not been told everything: {why}")


def _state(failure: BaseException | None) -> State:
    """How training ended."""
    if failure is None:
        return "finished"
    return "killed" if isinstance(failure, KeyboardInterrupt | StoppedError) else "failed"


def _streamed(job: Job) -> str:
    """How the rows come, where they are not all on this machine."""
    plan = getattr(job.train, "plan", None)
    if plan is None:
        return ""
    return f" streamed in {len(plan.counts)} blocks, {plan.window} of them mixed,"
