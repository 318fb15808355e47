"""Run a job spec: check, train on its workers, and see its record into MLflow."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import plugins, registry
from pipeline.errors import PipelineError, RunError, StoppedError, UnrecordedError, UsageError
from pipeline.launch import runs
from pipeline.redact import redacted
from pipeline.spec import JobSpec
from pipeline.specfile import load
from pipeline.track import delivery
from pipeline.train import files

if TYPE_CHECKING:
    from pipeline.losses.fit import Notice
    from pipeline.train.job import Job

MOST_PER_CORE = 4


@dataclass(frozen=True)
class Result:
    """A finished run."""

    run_id: str
    tracking_uri: str
    storage: str
    """Folder of the run: spec, journal of the curve, weights."""
    steps: int
    loss: float | None
    """Loss of the last step."""
    metrics: dict[str, float | None]
    """Last values of the validation rows: `loss` and each metric."""
    curve_sha256: str
    weights_sha256: str
    """Of the recorded model: the last step's weights, or those of the best evaluation."""
    best: dict[str, Any] | None = None
    """With `training.best_by`: metric, step and value of the best evaluation."""
    state: str = "finished"
    curve: list[dict[str, Any]] = field(default_factory=list, repr=False)
    """Every point of the journal: `step` with `train` and `terms`, or with `validation`."""
    workers: list[int] = field(default_factory=list)
    """How many workers it had: once, and again after each failure, resize or stop."""
    first_difference: int | None = None
    """The first step that gave other numbers when it was computed again after a failure."""
    first_step_seconds: float | None = None
    """From the start of the command to the end of the first step."""

    @cached_property
    def model(self) -> Any:
        """The recorded model: `model.predict(data_frame)` takes raw columns."""
        from pipeline.track.model import load_model

        return load_model(self.run_id, self.tracking_uri)

    @property
    def losses(self) -> list[float | None]:
        """The global loss of every step."""
        return [point["train"]["loss"] for point in self.curve if "train" in point]

    def summary(self) -> dict[str, Any]:
        """What `--json` prints."""
        keys = (
            "run_id", "tracking_uri", "state", "steps", "loss", "metrics", "curve_sha256",
            "weights_sha256", "best", "storage", "workers", "first_difference",
            "first_step_seconds",
        )  # fmt: skip
        return {key: getattr(self, key) for key in keys}


def check(
    path: str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    imports: Sequence[str] = (),
    *,
    live: Callable[[str], None] = lambda _: None,
) -> tuple[JobSpec, Job, list[Notice]]:
    """Everything that can be known before workers start: spec, files, columns, one real batch.

    `live` is told how far a conversion of the rows has come. Raises SpecError, DataError or
    ContractError, each saying what to change.
    """
    plugins.load(list(imports))
    spec = load(path, overrides)
    refuse_too_many(spec)
    _refuse_copy(spec)
    delivery.tracking_uri(storage_of(spec))
    from pipeline.train import check as checks
    from pipeline.train import job as jobs

    with _threads(1):  # faster for a small batch
        made = jobs.prepared(spec, base_of(path), live)
        return spec, made, checks.check(made)


def refuse_too_many(spec: JobSpec) -> None:
    """Some more workers than cores share them; very many would only stall the machine."""
    workers, cores = spec.workers, os.cpu_count() or 1
    wanted = workers.most * workers.cpus_per_worker
    if "RAY_ADDRESS" not in os.environ and wanted > MOST_PER_CORE * cores:
        raise UsageError(
            f"workers: {workers.most} x {workers.cpus_per_worker:g} CPUs on a machine with "
            f"{cores} cores, at most {MOST_PER_CORE * cores}; use a cluster, or fewer"
        )


def _refuse_copy(spec: JobSpec) -> None:
    """A copy of the runs must be somewhere else, and reachable."""
    place, mirror = spec.checkpoint.copy_to, runs.copies_of(spec)
    if mirror is None or place is None:
        return
    if "://" not in place and Path(place).expanduser().resolve() == storage_of(spec):
        raise UsageError(f"checkpoint.copy_to: {place} is `storage` itself; give another folder")
    mirror.runs(spec.name)


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    """Torch's threads of one operation, and afterwards the caller's own setting again."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def base_of(path: str | Path | Mapping[str, Any]) -> Path:
    """Where relative data paths of the spec start."""
    return Path.cwd() if isinstance(path, Mapping) else Path(path).resolve().parent


def run(
    path: str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    imports: Sequence[str] = (),
    *,
    fresh: bool = False,
    say: Callable[[str], None] | None = None,
    live: Callable[[str], None] = lambda _: None,
    started: float | None = None,
) -> Result:
    """Train the job of `path` with dotted `overrides`, and record it in MLflow.

    A run of the same job that is not finished goes on where it was, and one that is finished is
    returned; `fresh` starts anew. What is trained may not have changed in between.
    `imports` are modules or files with own losses, models, metrics, optimizers or schedules. `say`
    gets lines for the user, `live` lines of which each replaces the last. Raises the errors of
    `check`, RunError, or RecordError when only the record is missing.
    """
    started = time.time() if started is None else started

    def tell(line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # nobody reads it any more
            if say:
                say(line)

    spec, job, notices = check(path, overrides, imports, live=live)
    modules = plugins.homes(components(spec), plugins.load(list(imports)))
    with contextlib.ExitStack() as held:
        if "RAY_ADDRESS" in os.environ:  # what it cannot hold is refused before there is a run
            from pipeline.launch.cluster import session

            held.enter_context(session(spec))
        with runs.choosing(storage_of(spec), spec.name):
            folder = _folder(job, modules, fresh, tell)
            is_finished = files.is_done(folder)
            if not is_finished:
                held.enter_context(files.locked(folder))
                for said in runs.recovered(folder, job):
                    tell(f"note  {said}")
                if damage := files.damage(folder):
                    tell(f"note  {folder.name} was finished, but {damage}: its end is done again")
                is_finished = files.is_done(folder)
            if is_finished:
                tell(f"run   {folder.name} is finished already; --fresh starts it anew")
            else:
                for notice in notices:
                    tell(f"note  {notice}")
                plugins.carry(modules, folder / "imports")
                delivery.prepare(spec, job, folder, modules)
                _copy_record(job, folder)
        if is_finished:
            held.close()
            return _finished(folder, started, tell)
        return _trained(job, folder, modules, base_of(path), started, tell)


def _folder(job: Job, modules: list[str], fresh: bool, tell: Callable[[str], None]) -> Path:
    """The last run's folder if this is the same job, else a new one.

    Raises UsageError when an unfinished run would go on as another job.
    """
    storage, name = storage_of(job.spec), job.spec.name
    mirror = runs.copies_of(job.spec)
    last = None if fresh else runs.latest(storage, name, mirror)
    if last is not None:
        changed = runs.changes(last, job, modules)
        if not changed:
            return last
        if not (last / files.DONE).exists():
            runs.refuse_changed(last, changed, mirror)
            tell(f"note  {last.name} is left, as what it trains has changed: {changed[0]}")
    return runs.new(storage, name, mirror)


def _copy_record(job: Job, folder: Path) -> None:
    """Where the run has a copy, that has its record before anything else: it is ours from now."""
    from pipeline.train.mirror import FAULTS, reason

    mirror = runs.copies_of(job.spec)
    if mirror is None:
        return
    try:
        mirror.of(folder.name).put(folder / files.RECORD)
    except FAULTS as error:
        raise UsageError(f"checkpoint.copy_to: {mirror.shown}: {reason(error)}") from None


def _finished(folder: Path, started: float, tell: Callable[[str], None]) -> Result:
    """The result of a run that is finished; what MLflow still lacks is delivered."""
    from pipeline.launch.stop import noted

    recorded = delivery.recorded(folder)
    if not recorded.get("complete") or "model_uri" not in recorded:
        with files.locked(folder), noted() as signals:
            delivering = delivery.start(folder, delivery.ALONE)
            recorded = delivery.wait(delivering, folder, tell, signals)
    return _result(folder, recorded, started)


def _trained(
    job: Job, folder: Path, modules: list[str], base: Path, started: float,
    tell: Callable[[str], None],
) -> Result:  # fmt: skip
    """Train the job in its folder, from the start or from where it was."""
    from pipeline.launch.cluster import fit, in_process
    from pipeline.launch.progress import Progress
    from pipeline.launch.stop import noted, raised
    from pipeline.train.curve import Reader

    spec = job.spec
    config = work_config(job, folder, modules, base)
    least, most = spec.workers.least, spec.workers.most
    number = str(most) if least == most else f"{least} to {most}"
    where = "in this process" if in_process(spec) else f"on {number} Ray workers"
    tell(f"run   {folder.name}, {job.num_rows:,} rows{_streamed(job)} {where}")
    waiting = "" if in_process(spec) else f"starting {number} Ray workers ..."
    reader = Reader(folder / files.CURVE)
    list(reader.new())  # what an earlier command has shown
    shown = Progress(
        reader, job.num_steps, spec.training.epochs, job.num_rows,
        lambda: delivery.trouble(folder), waiting,
    )  # fmt: skip
    failure: BaseException | None = None
    with noted() as signals:  # that come when training has ended: they cut the recording off
        delivering = delivery.start(folder)
        try:
            with raised(), shown, _threads(spec.workers.threads):
                if signals:
                    raise StoppedError(signals.pop())
                fit(spec, config, folder.name)
        except (KeyboardInterrupt, Exception) as error:
            failure = error
        if files.is_done(folder):
            failure = None  # what came after that undoes nothing
        elif failure is None:
            failure = RunError(f"the workers ended without a result in {folder}")
        state = _state(failure)
        reason = redacted(str(failure) or repr(failure)) if state == "failed" else ""
        recorded = delivery.end(delivering, folder, state, tell, reason, signals)
    if failure is not None:
        if isinstance(failure, PipelineError):
            about = {key: recorded.get(key) for key in ("run_id", "tracking_uri")}
            failure.run = {"storage": str(folder), **about}
        if state == "failed":
            tell(f"kept  {folder}")
        if recorded.get("run_id"):
            tell(f"mlflow run {recorded['run_id']} ({state}) in {recorded['tracking_uri']}")
        if not recorded.get("complete"):
            tell(f"note  MLflow has not been told everything: {recorded.get('error')}")
        raise failure
    result = _result(folder, recorded, started)
    for said in result.curve[-1].get("said", []) if result.curve else []:
        tell(f"note  {said}")
    if spec.training.best_by and result.best is None:
        tell(f"note  no evaluation had a {spec.training.best_by}: the model has the last weights")
    return result


def _state(failure: BaseException | None) -> str:
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


def work_config(job: Job, folder: Path, modules: list[str], base: Path) -> dict[str, Any]:
    """What the workers of a run are told."""
    from pipeline.launch.cluster import in_process

    config: dict[str, Any] = {
        "spec": job.spec.model_dump(mode="json"),
        "base": str(base),
        "folder": str(folder),
        "storage": str(folder.parent / ".ray"),
        "imports": modules,
        "origins": plugins.origins(modules, folder / "imports"),
        "fingerprint": job.fingerprint,
    }
    if in_process(job.spec):
        config["job"] = job
    return config


def components(spec: JobSpec) -> list[Callable[..., Any]]:
    """What the spec names in the registries."""
    named = [(registry.losses, term.name) for term in spec.loss]
    named += [(registry.models, spec.model.name), (registry.optimizers, spec.optimizer.name)]
    named += [(registry.schedules, spec.schedule.name)]
    named += [(registry.metrics, name) for name in spec.metrics or []]
    return [kind[name].build for kind, name in named]


def storage_of(spec: JobSpec) -> Path:
    """Folder of the runs. A Ray job's own folder is deleted with it, so there it is below home."""
    start = Path.home() if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ else Path.cwd()
    return (start / Path(spec.storage).expanduser()).resolve()


def _result(folder: Path, recorded: dict[str, Any], started: float) -> Result:
    from pipeline.train.curve import Reader, curve_sha256

    points = list(Reader(folder / files.CURVE).new())
    try:
        done = files.read_json(folder / files.DONE)
    except (OSError, ValueError):
        raise RunError(f"the workers ended without a result in {folder}") from None
    train = [point for point in points if "train" in point]
    news = [point["time"] / 1000 for point in train if point["time"] / 1000 >= started]
    validation = [point["validation"] for point in points if "validation" in point]
    result = Result(
        run_id=recorded.get("run_id", ""),
        tracking_uri=recorded.get("tracking_uri", ""),
        storage=str(folder),
        steps=done["steps"],
        loss=train[-1]["train"]["loss"] if train else None,
        metrics=validation[-1] if validation else {},
        curve_sha256=curve_sha256(points),
        weights_sha256=done["weights_sha256"],
        best=done["best"],
        state="finished" if recorded.get("complete") else "unrecorded",
        curve=points,
        workers=done["workers"],
        first_difference=done["first_difference"],
        first_step_seconds=round(news[0] - started, 3) if news else None,
    )
    if not recorded.get("complete"):
        raise UnrecordedError(result, recorded.get("error", "the delivery to MLflow was cut off"))
    return result
