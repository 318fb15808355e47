"""Is the promise kept for this job, on this hardware? Its first steps, run in several ways.

The bits of curve, validation and weights must be the same on any number of workers, and when
workers are killed and the run resumes with another number of them. A plain torch loop, and other
cuts into micro-batches, must give the same curve to rounding; these are run in float64, since an
optimizer such as Adam can make much of the last bits of a float32. The components are asked one by
one, too.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline import plugins, tracebacks
from pipeline.errors import PipelineError, RunError, StoppedError
from pipeline.launch import run as launch
from pipeline.spec import JobSpec

if TYPE_CHECKING:
    from pipeline.rundir import RunDir
    from pipeline.rundir.records import Numbers, Point
    from pipeline.train.job import Job

TOLERANCE = 1e-5
"""Largest relative difference of a loss that rounding may leave after the first steps."""
WORKERS = (1, 2, 3, 4)
MIN_TIMES, MAX_TIMES = 200, 2000
"""Within these, the model is asked about the same rows as often as the legs call it."""

Promise = Literal["bits", "rounding"]
Verdict = Literal["reference", "held", "broken", "not promised", "failed"]


@dataclass(frozen=True)
class Leg:
    """One way to run the first steps."""

    title: str
    promise: Promise
    microbatch_size: int | None
    workers: tuple[int, ...]
    """Numbers of workers, one after the other: each but the last is killed."""
    kills: tuple[tuple[int, int], ...] = ()
    """Rank and step of each kill."""
    _: KW_ONLY
    precision: str | None = None
    """The job's own unless given."""
    is_reference: bool = False
    """The other legs of its promise are compared with this one."""
    is_plain: bool = False
    """Whether a plain torch loop in this process computes it, not the workers' code."""


@dataclass(frozen=True)
class Outcome:
    """What a leg gave."""

    title: str
    promise: Promise
    verdict: Verdict
    curve_sha256: str = ""
    weights_sha256: str = ""
    difference: float | None = None
    """Largest relative difference of a loss from the reference's."""
    first_step: int | None = None
    """The first step whose loss differs."""
    seconds: float = 0.0
    text: str = ""


@dataclass(frozen=True)
class Proof:
    """Everything `prove` found."""

    name: str
    steps: int
    all_steps: int
    microbatch_size: int
    bits: dict[str, Any]
    """What the bits depend on: software, device, threads."""
    spec_digest: str
    data_fingerprint: str
    outcomes: list[Outcome]
    suspects: list[str]
    experiment: str
    storage: str
    """Folder of the legs' journals."""

    @property
    def is_kept(self) -> bool:
        """Whether every leg held what is promised for it, and no component breaks it by itself."""
        kept = ("reference", "held", "not promised")
        return not self.suspects and all(o.verdict in kept for o in self.outcomes)

    @property
    def tags(self) -> dict[str, str]:
        """Tags of its run in MLflow, by which a proof of a job is found."""
        tags = {
            "pipeline.proved": "yes" if self.is_kept else "no",
            "pipeline.spec_digest": self.spec_digest,
            "pipeline.data_fingerprint": self.data_fingerprint,
        }
        return tags | ({"pipeline.probes": "; ".join(self.suspects)} if self.suspects else {})

    def summary(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {"state": "held" if self.is_kept else "broken", **asdict(self)}


def prove(
    path: str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    imports: Sequence[str] = (),
    *,
    steps: int = 50,
    workers: Sequence[int] = WORKERS,
    tolerance: float = TOLERANCE,
    each: Callable[[Outcome], None] = lambda _: None,
    say: Callable[[str], None] = lambda _: None,
) -> Proof:
    """Run the job's first `steps` on each number of `workers`, and compare.

    `each` gets every outcome as soon as it is known, `say` what is about to run. Raises the errors
    of `pipeline.check`, and StoppedError after a signal; a leg that fails or differs is part of the
    proof.
    """
    spec, job, _ = launch.check(path, overrides, imports, live=say)
    modules = plugins.homes(launch.components(spec), plugins.load(list(imports)))
    from pipeline.launch import ray_cluster, signals
    from pipeline.launch.resume import Runs
    from pipeline.train import determinism
    from pipeline.verify import diagnose

    folder = Runs(spec, f"prove-{spec.name}").new()
    plugins.carry(modules, folder.imports)
    steps = min(steps, job.num_steps)
    size = spec.training.microbatch_size or -(-_batch_size(job) // max(workers))
    counts = sorted({1, *workers})
    outcomes: list[Outcome] = []
    runner = _Runner(job, folder, modules, launch.base_of(path), steps, tolerance)
    most = _job_of(job, Leg("", "bits", size, (max(counts),))).spec
    launch.refuse_too_many(most)
    legs = list(_legs(job, size, counts, steps))
    told = launch.assignment(job, folder, modules, launch.base_of(path))
    session = ray_cluster.session(most) if max(counts) > 1 else contextlib.nullcontext()
    try:
        with signals.signals_raise(), session:
            say("asking the components, here and in other processes ...")
            same_cuts, found_suspects = _ask_components(job, size, steps)
            found_suspects += diagnose.suspects(told)
            for leg in legs:
                if leg.promise == "rounding" and leg.microbatch_size not in same_cuts:
                    text = "the model draws random numbers, which follow the micro-batch"
                    outcome = Outcome(leg.title, leg.promise, "not promised", text=text)
                else:
                    say(f"running {leg.title} ...")
                    outcome = runner.run(leg)
                outcomes.append(outcome)
                each(outcome)
    except StoppedError as error:
        if len(outcomes) < len(legs):
            text = f"; {len(outcomes)} of {len(legs)} ways have run: no verdict"
            raise StoppedError(error.number, text) from error
    fingerprint = determinism.fingerprint(_job_of(job, Leg("", "bits", size, (1,))).spec)
    return Proof(
        spec.name,
        steps,
        job.num_steps,
        size,
        fingerprint,
        spec.digest,
        job.fingerprint,
        outcomes,
        found_suspects,
        spec.tracking.experiment or spec.name,
        str(folder.path),
    )


def _batch_size(job: Job) -> int:
    return min(job.spec.training.batch_size, job.num_rows)


def _ask_components(job: Job, size: int, steps: int) -> tuple[set[int | None], list[str]]:
    """Cuts into micro-batches that give one curve, and which components break a promise.

    Random numbers, as of dropout, follow the micro-batch.
    """
    from pipeline.probes import suspects
    from pipeline.probes.steadiness import draws
    from pipeline.train.build import build_optimizer

    with job.train.opened("prove") as rows:
        batch = rows.gather(job.sampler().rows(0))
    bound = job.objective()
    optimizer = job.spec.optimizer.name, partial(build_optimizer, job.spec)
    times = min(max(steps * -(-_batch_size(job) // size), MIN_TIMES), MAX_TIMES)
    found = suspects(bound, batch, size, optimizer, times)
    same_cuts = {size, *_cuts(job, size)}
    if draws(bound, batch):
        same_cuts = set() if bound.is_coupled else {size}
    return same_cuts, found


def _cuts(job: Job, size: int) -> list[int | None]:
    """Other sizes of micro-batches to try; None is the whole batch at once."""
    other = size // 2 if size > 1 else 2
    return [*([other] if other < _batch_size(job) else []), None]


def _legs(job: Job, size: int, counts: list[int], steps: int) -> Iterator[Leg]:
    """The reference first."""
    for num_workers in counts:
        is_reference = num_workers == counts[0]
        yield Leg(_show(num_workers), "bits", size, (num_workers,), is_reference=is_reference)
    most = counts[-1]
    if most > 1 and steps > 2:
        first = max(steps * 2 // 5, 1)
        second = max(steps * 7 // 10, 2)
        attempts = (max(most - 1, 1), max(most - 2, 1), most)
        kills = ((attempts[0] - 1, first), (0, second))
        title = (
            f"{_show(attempts[0])}, one killed at step {first}, resumed with {attempts[1]}, "
            f"killed at step {second}, resumed with {attempts[2]}"
        )
        yield Leg(title, "bits", size, attempts, kills)

    def in_float64(title: str, size: int | None, num_workers: int = 1) -> Leg:
        return Leg(f"float64, {title}", "rounding", size, (num_workers,), precision="float64")

    yield replace(in_float64("plain torch", size), is_reference=True, is_plain=True)
    yield in_float64("1 worker", size)
    *others, whole = _cuts(job, size)
    for other in others:
        yield in_float64(f"micro-batches of {other}", other)
    if size < _batch_size(job):
        yield in_float64("whole batches at once", whole)
    if most > 1:
        some = min(3, most)
        yield in_float64(f"{_show(some)} without micro-batches", None, some)


def _show(num_workers: int) -> str:
    return f"{num_workers} worker{'s' if num_workers > 1 else ''}"


def _job_of(job: Job, leg: Leg) -> Job:
    """The job as this leg runs it, on the first of its numbers of workers."""
    tree = {**job.spec.model_dump(mode="json"), "storage": "runs"}  # each has a folder of its own
    tree["training"]["microbatch_size"] = leg.microbatch_size
    tree["training"]["precision"] = leg.precision or tree["training"]["precision"]
    tree["training"]["stop"] = None  # it is about the first steps, all of them
    tree["workers"] |= {"num": leg.workers[0], "min": None, "max": None}
    tree["checkpoint"] |= {"every_steps": None, "every_seconds": 3600.0, "copy_to": None}
    if leg.kills:
        tree["checkpoint"]["every_steps"] = max(leg.kills[0][1] // 3, 1)
    return replace(job, spec=JobSpec.model_validate(tree))


@dataclass
class _Runner:
    """Runs legs of one job in folders of their own, and compares them."""

    job: Job
    folder: RunDir
    modules: list[str]
    base: Path
    steps: int
    tolerance: float
    references: dict[Promise, tuple[Outcome, Sequence[Point]]] = field(default_factory=dict)
    """What the other legs of a promise are compared with, and its points."""
    wide: Job | None = None
    """The job with its rows in float64."""

    def run(self, leg: Leg) -> Outcome:
        """The leg's outcome beside the reference's."""
        from pipeline.rundir.journal import curve_sha256

        if leg.promise not in self.references and not leg.is_reference:
            text = "there is nothing to compare it with"
            return Outcome(leg.title, leg.promise, "not promised", text=text)
        started = time.perf_counter()
        try:
            points, weights = self._train_plainly(leg) if leg.is_plain else self._train(leg)
        except StoppedError:
            raise
        except PipelineError as error:
            is_unable = leg.is_plain and bool(tracebacks.own_frames(error))
            verdict: Verdict = "not promised" if is_unable else "failed"
            return Outcome(leg.title, leg.promise, verdict, text=str(error).partition("\n")[0])
        seconds = round(time.perf_counter() - started, 1)
        curve = curve_sha256(points)
        given = Outcome(leg.title, leg.promise, "reference", curve, weights, seconds=seconds)
        if leg.is_reference:
            self.references[leg.promise] = given, points
            return given
        reference, others = self.references[leg.promise]
        difference, step = _difference(points, others)
        text = ""
        if leg.promise == "bits":
            pairs = {
                "curve": (curve, reference.curve_sha256),
                "weights": (weights, reference.weights_sha256),
                "validation": (_validation(points), _validation(others)),
            }
            odd = [name for name, (one, other) in pairs.items() if one != other]
            verdict, text = ("broken", f"other {' and '.join(odd)}") if odd else ("held", "")
        else:
            verdict = "held" if difference <= self.tolerance else "broken"
        return replace(given, verdict=verdict, difference=difference, first_step=step, text=text)

    def _prepare(self, leg: Leg) -> Job:
        """The job as the leg runs it, its rows in the leg's precision."""
        from pipeline.train.job import prepare

        job = _job_of(self.job, leg)
        if leg.precision is None:
            return job
        if self.wide is None:
            self.wide = prepare(job.spec, self.base, initial=job.initial)
        return replace(self.wide, spec=job.spec)

    def _train_plainly(self, leg: Leg) -> tuple[Sequence[Point], str]:
        """Points and weights of a plain torch loop. Raises RunError where that fails."""
        from pipeline.train.weights import weights_sha256
        from pipeline.verify import plain

        try:
            points, bound = plain.steps(self._prepare(leg), self.steps)
        except PipelineError:
            raise
        except Exception as error:  # a user's components can fail in any way
            raise RunError(tracebacks.describe(error)) from error
        return points, weights_sha256(bound.state_dict())

    def _train(self, leg: Leg) -> tuple[Sequence[Point], str]:
        """Points of the journal and SHA-256 of the weights, after all kills."""
        from pipeline.launch.ray_trainer import fit
        from pipeline.rundir import RunDir
        from pipeline.rundir.journal import Reader
        from pipeline.rundir.records import Done

        run = RunDir(self.folder.path / leg.title.replace(" ", "-").replace(",", ""))
        run.path.mkdir()
        if self.modules:
            run.imports.symlink_to(self.folder.imports)
        for number, workers in enumerate(leg.workers):
            job = self._prepare(replace(leg, workers=(workers,)))
            run.spec.write_text(job.spec.dump(), encoding="utf-8")
            told = launch.assignment(job, run, self.modules, self.base)
            faults = leg.kills[number : number + 1]  # which must not strike this process
            told = replace(
                told, num_steps=self.steps, faults=faults, job=None if faults else told.job
            )
            is_last = number == len(leg.workers) - 1
            try:
                fit(told, max_failures=0)
            except StoppedError:
                raise
            except RunError:
                if is_last or not run.fault_mark(*leg.kills[number]).exists():
                    raise
            else:
                if not is_last:
                    raise RunError("a worker that was to be killed was not")
        done = Done.read(run.done)
        shutil.rmtree(run.checkpoints)  # journals are kept as evidence, states are large
        run.weights.unlink()
        return list(Reader(run.journal).new()), done.weights_sha256


def _losses(points: Sequence[Point]) -> dict[int, list[float | None]]:
    return {p["step"]: list(p["terms"].values()) for p in points if "train" in p}


def _validation(points: Sequence[Point]) -> list[tuple[int, Numbers]]:
    return [(p["step"], p["validation"]) for p in points if "validation" in p]


def _difference(points: Sequence[Point], reference: Sequence[Point]) -> tuple[float, int | None]:
    """Largest relative difference of a term's loss, and the first step that differs at all."""
    largest, first = 0.0, None
    others = _losses(reference)
    for step, losses in _losses(points).items():
        for one, other in zip(losses, others[step], strict=True):
            if one == other:
                continue
            first = first or step
            difference = float("inf")
            if one is not None and other is not None:
                difference = abs(one - other) / max(abs(one), abs(other))
            largest = max(largest, difference)
    return largest, first
