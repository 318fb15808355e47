"""What each worker runs: the whole training of one job, the same function on one and on many."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline import plugins, tracebacks
from pipeline.data import cache
from pipeline.data.batch import Batch
from pipeline.data.feed import Feed
from pipeline.data.order import Rows, cut, owned
from pipeline.data.stream import Streamed
from pipeline.errors import NonFiniteError, PipelineError, RunError, UsageError
from pipeline.losses.fit import check_targets
from pipeline.schedules import learning_rate_factor
from pipeline.spec import JobSpec, Schedule
from pipeline.train import bits, checkpoint, drift, faults, files, reduce
from pipeline.train.best import Best
from pipeline.train.curve import Journal, mended
from pipeline.train.evaluate import chosen, evaluate
from pipeline.train.job import Job, build_optimizer, objective, prepared, trial_batch
from pipeline.train.lease import Lease
from pipeline.train.record import Record, point_of
from pipeline.train.step import train_step
from pipeline.train.tree import Ordered, is_small
from pipeline.train.weights import weights_sha256

MOST_ROWS = 100  # of a step that is left out, named in the journal


def work(config: dict[str, Any]) -> None:
    """Train the job in `config` (spec, base, folder, imports); rank 0 writes curve and weights.

    Started again on the same folder, by any number of workers, it goes on from the newest
    checkpoint.
    """
    folder = Path(config["folder"])
    plugins.receive(config["imports"], folder / "imports")
    tracebacks.copied_from.update(config["origins"])
    spec = JobSpec.model_validate(config["spec"])
    if not (folder / "spec.yaml").exists():
        raise RunError(
            f"worker {reduce.rank()} does not see the run's folder {folder}: "
            "set `storage` to a folder that every node mounts"
        )
    torch.set_num_threads(spec.workers.threads)
    job = config.get("job") or prepared(
        spec, Path(config["base"]), trusted_seconds=cache.TRUSTED_SECONDS
    )
    if job.fingerprint != config["fingerprint"]:
        raise RunError(
            f"worker {reduce.rank()} reads other rows from {spec.data.train} than the command "
            "that started it: every node must see the same files"
        )
    planned = faults.planned(config.get("faults", []), folder, reduce.rank())
    try:
        train(job, folder, planned, config.get("num_steps"), is_own_process="job" not in config)
    except Exception as error:
        if reduce.is_echo(error) or not tracebacks.own_frames(error):
            raise
        path = folder / files.TRACEBACKS.replace("*", str(reduce.rank()))
        tracebacks.write(error, path)
        error.add_note(
            f"on worker {reduce.rank()} of {reduce.num_workers()}; the whole traceback: {path}"
        )
        if isinstance(error, PipelineError):
            raise
        raise RunError(tracebacks.in_full(error)) from error


def train(
    job: Job,
    folder: Path,
    before_step: Callable[[int], None] | None = None,
    num_steps: int | None = None,
    is_own_process: bool = False,
) -> None:
    """Epochs of steps, each followed by an evaluation; ends with the weights in `folder`.

    With `num_steps` it ends after these, and an evaluation of them. `is_own_process` says that
    this process does nothing else, and may be killed by its successor.
    """
    if files.is_done(folder):
        return
    spec, settings = job.spec, job.spec.training
    device = _device(spec)
    bound = objective(spec, job.fields, trial_batch(job)).to(device)
    several = reduce.num_workers() > 1
    start = f"{weights_sha256(bound.state_dict())} {sorted(bound.changing.items())}"
    if several and not reduce.agree(zlib.crc32(start.encode())):
        raise UsageError(
            f"model {spec.model.name}: its weights start differently on each worker; take random "
            "numbers from torch only, which the pipeline seeds"
        )
    exact = settings.microbatch_size is not None
    in_order = exact or is_small(bound)
    gradients = Ordered(bound) if in_order else reduce.Overlapped(bound, device)
    optimizer = build_optimizer(spec, bound.parameters())
    per_epoch, last_step = job.steps_per_epoch, min(num_steps or job.num_steps, job.num_steps)
    order = job.order()
    metrics = chosen(bound.terms, spec.metrics)

    def is_evaluated(step: int) -> bool:
        return job.validation is not None and (step % per_epoch == 0 or step == last_step)

    lease = Lease(folder, is_own_process) if reduce.rank() == 0 else None
    best = Best(settings.best_by, bound.terms, metrics) if settings.best_by and lease else None
    first_step, num_skipped = _resume(job, folder, bound, optimizer, lease, best, is_evaluated)
    record = Record(job, folder, first_step, lease, best) if lease else None

    def validate(step: int) -> None:
        if job.validation is not None:
            size = settings.batch_size if bound.is_coupled else settings.microbatch_size
            held_out = np.arange(job.num_validation_rows)
            size = size or settings.batch_size
            said: list[str] = []
            with tracebacks.noting(f"in the evaluation after step {step}"):
                values = evaluate(bound, job.validation, held_out, size, metrics, device, said)
            if record:
                record.write_evaluation(step, step / per_epoch, values, bound, said)

    def pieces(step: int) -> list[Rows]:
        job.train.expect(order.blocks(step))
        return cut(order.rows(step), settings.microbatch_size, reduce.num_workers())

    def own(num_microbatches: int) -> range:
        return owned(num_microbatches, reduce.rank(), reduce.num_workers())

    def count(batch: Batch) -> Tensor:
        if isinstance(job.train, Streamed):  # which nobody has looked at before training
            check_targets(bound.terms, batch)
        return bound.denominators(batch)

    pinned = device.type == "cuda"
    feed = Feed(job.train, pieces, own, count, first_step, last_step, pinned)
    rows = job.train.opened(str(folder.resolve()))
    with bits.deterministic(exact), rows, feed, record or contextlib.nullcontext():
        if first_step == 0 and is_evaluated(0):
            validate(0)
        denominators = None
        for share, following in feed:
            step = share.step
            if before_step:
                before_step(step)
            rate = _set_learning_rate(optimizer, spec.schedule, step, job.num_steps)
            try:
                losses = train_step(
                    bound,
                    gradients,
                    optimizer,
                    share.own,
                    len(share.pieces),
                    step=step,
                    seed=settings.seed,
                    clip_norm=settings.clip_norm,
                    device=device,
                    stop=record.is_stopping() if record else False,
                    save=record.is_due(step + 1) if record else False,
                    may_skip=num_skipped < settings.skip_nonfinite,
                    denominators=denominators,
                    following=(following.counts, len(following.pieces)) if following else None,
                )
            except NonFiniteError as error:
                fault = _with_rows(error, share.pieces, folder)
                if settings.skip_nonfinite:
                    fault.add_note(
                        f"{num_skipped} of {settings.skip_nonfinite} are left out already"
                    )
                raise fault from None
            except Exception as error:
                error.add_note(f"in step {step + 1}")
                raise
            denominators = losses.following
            num_skipped += losses.fault is not None
            if record:
                point = point_of(step + 1, per_epoch, [t.label for t in bound.terms], losses, rate)
                if losses.fault is not None:
                    rows_of = _with_rows(losses.fault, share.pieces, folder).rows
                    point |= {"skipped": list(rows_of[:MOST_ROWS])}
                record.write(point, share.num_rows, is_last=step + 1 == last_step)
            if is_evaluated(step + 1):
                validate(step + 1)
            if losses.is_saved or losses.is_last or step + 1 == last_step:
                drift.refuse(bound, optimizer, gradients.buffers, step + 1)
            if record and (losses.is_saved or losses.is_last):
                record.save(step + 1, bound, optimizer, num_skipped, losses.is_last)
            if losses.is_last and step + 1 < last_step:
                return
    if record:
        record.finish(bound, last_step)
    if dist.is_initialized():
        dist.barrier()


def _with_rows(error: NonFiniteError, pieces: list[Rows], folder: Path) -> NonFiniteError:
    """The error with the rows it comes from; the whole list is kept in the run's folder."""
    odd = [int(row) for number in error.microbatches for row in pieces[number]]
    facts = {
        "step": error.step, "gradient_norm": str(error.gradient_norm),
        "losses": {name: str(value) for name, value in error.terms.items()},
        "microbatches": error.microbatches, "rows": odd,
    }  # fmt: skip
    if reduce.rank() == 0:
        files.write_json(folder / files.NONFINITE, facts)
    return NonFiniteError(error.step, error.gradient_norm, error.terms, error.microbatches, odd)


def _resume(
    job: Job, folder: Path, bound: torch.nn.Module, optimizer: torch.optim.Optimizer,
    lease: Lease | None, best: Best | None, is_evaluated: Callable[[int], bool],
) -> tuple[int, int]:  # fmt: skip
    """Steps done, and left out, by the newest checkpoint, whose state every worker takes."""
    step = 0
    if lease is not None:
        (folder / files.DONE).unlink(missing_ok=True)  # it is not, or this would not be asked
        whole, damage = mended(folder / files.CURVE, is_evaluated, lease.check)
        step, passed = checkpoint.newest(folder, bits.identity(job), whole)
        for text in filter(None, [damage, *passed]):
            journal = Journal(folder / files.CURVE, job.num_steps, may_write=lease.check)
            journal.event(step, "damage", text=text)
            journal.close()
    step = int(reduce.total(torch.tensor([step], dtype=torch.float64)))
    if not step:
        return 0, 0
    state = checkpoint.load(folder, step)
    checkpoint.restore(state, bound, optimizer)
    if best is not None:
        best.kept = state["best"]
    return step, state["num_skipped"]


def _set_learning_rate(
    optimizer: torch.optim.Optimizer, schedule: Schedule, step: int, num_steps: int
) -> float:
    """Each group's rate at `step`, a factor of the one it was built with; the first is returned."""
    warmup, options = schedule.warmup_steps, schedule.options
    factor = learning_rate_factor(schedule.name, options, warmup, step, num_steps)
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
    return float(optimizer.param_groups[0]["lr"])


def _device(spec: JobSpec) -> torch.device:
    """This worker's GPU if the spec asks for one, never the CPU in its place."""
    if not spec.workers.gpu:
        return torch.device("cpu")
    device: torch.device = ray.train.torch.get_device()
    if device.type != "cuda":
        raise UsageError("workers.gpu: this worker has no GPU that torch can use")
    return device
