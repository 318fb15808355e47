"""All that can be known of a job before it trains, each fault with what to change."""

from __future__ import annotations

import inspect
import math

import numpy as np
import torch
from torch.optim import Optimizer

from pipeline.checks.batch import Notice, check_batch
from pipeline.checks.lints import unusual
from pipeline.checks.metrics import try_metrics
from pipeline.data.batch import Batch, num_rows, select
from pipeline.data.partition import split_batch
from pipeline.distributed.ordered import is_small
from pipeline.errors import InputError, UsageError
from pipeline.losses.objective import Objective
from pipeline.losses.terms import check_targets
from pipeline.probes.buffers import changing_buffers
from pipeline.probes.steadiness import rewritten
from pipeline.tracebacks import describe
from pipeline.train.best import BestWeights
from pipeline.train.build import build_optimizer, model_error
from pipeline.train.job import Job
from pipeline.train.stopping import EarlyStop, Plateau
from pipeline.train.term_metrics import choose_metrics


def check(job: Job) -> list[Notice]:
    """Everything that can be known before training. Raises ContractError with the fix."""
    targets = [field.name for field in job.fields if field.is_target]
    trial = job.trial
    job.sampler()  # refuses what rows cannot be drawn by
    bound = job.objective()
    for rows in (job.train, job.validation, job.test):
        for batch in rows.parts(targets) if rows is not None and targets else ():
            check_targets(bound.terms, batch)
    metrics = choose_metrics(bound.terms, job.spec.metrics, job.spec.data.weighs_metrics)
    try:
        notices = check_batch(bound, trial)
        if job.validation:
            try_metrics(bound, job.validation, metrics, job.spec.training.batch_size)
    except InputError:
        raise
    except Exception as error:  # as above: a user's model can fail in any way
        raise model_error(
            job.spec.model.name, error, bound.inputs, "fails on the first rows: "
        ) from error
    if job.spec.training.best_by:
        BestWeights(job.spec.training.best_by, bound.terms, metrics)
    if job.spec.training.stop:
        EarlyStop(job.spec.training.stop, bound.terms, metrics)
    if job.spec.schedule.is_plateau:
        Plateau(job.spec.schedule.options, bound.terms, metrics)
    notices += _rewriting(job, bound, trial)
    changing = changing_buffers(bound, trial)
    notices += [_averaging_notice(bound, name) for name, adds_up in changing.items() if not adds_up]
    _try_smallest(job, bound, trial)
    _try_step(job, bound, trial)
    _try_schedule(job)
    return notices + unusual(job, bound.terms, trial)


def _averaging_notice(bound: Objective, name: str) -> Notice:
    is_mean = bound.get_buffer(name).is_floating_point() or bound.get_buffer(name).is_complex()
    taken = "the mean" if is_mean else "the largest"
    text = (
        f"buffer {name!r} changes in forward passes, and not by a sum over rows: of what "
        f"micro-batches make of it {taken} is taken, so it depends on training.microbatch_size"
    )
    return Notice("model", text)


def _rewriting(job: Job, bound: Objective, trial: Batch) -> list[Notice]:
    """Whether a forward pass writes into weights: workers see other rows, and would part.

    Raises UsageError where there are several.
    """
    name = rewritten(bound, trial)
    if name is None:
        return []
    text = (
        f"writes its parameter {name!r} in the forward pass, as an Embedding with max_norm does: "
        "each micro-batch would do so by its own rows"
    )
    if job.spec.workers.most > 1:
        fix = "compute with a changed copy, or change it in a custom optimizer's step"
        raise UsageError(f"model {job.spec.model.name}: {text}, each worker too: {fix}")
    return [Notice("model", f"{text}; it cannot train on several workers")]


def _try_smallest(job: Job, bound: Objective, trial: Batch) -> None:
    """The smallest micro-batch of an epoch through the model, as BatchNorm refuses one row."""
    settings, most = job.spec.training, job.spec.workers.most
    last = job.rows_per_epoch % settings.batch_size or settings.batch_size
    sizes = (min(settings.batch_size, job.rows_per_epoch), last)
    parts = [
        part for n in sizes for part in split_batch(np.arange(n), settings.microbatch_size, most)
    ]
    size = min(map(len, parts))
    try:
        with torch.no_grad():
            bound.predict(select(trial, torch.arange(min(size, num_rows(trial)))))
    except Exception as error:  # a user's model can fail in any way
        raise UsageError(
            f"model {job.spec.model.name}: fails on {size} row{'s' if size > 1 else ''}, which the "
            f"smallest micro-batch of an epoch has: {describe(error)}\n  {job.rows_per_epoch} "
            f"rows, training.batch_size {settings.batch_size}, microbatch_size "
            f"{settings.microbatch_size}, up to {most} workers: change one of them, or BatchNorm "
            "to GroupNorm or LayerNorm"
        ) from error


def _try_step(job: Job, bound: Objective, trial: Batch) -> None:
    """One step of the optimizer on the first rows, and what several workers could not sum."""
    name = job.spec.optimizer.name
    numerators = bound(trial)[0].sum()
    by_ddp = job.spec.workers.most > 1 and job.spec.training.microbatch_size is None
    if by_ddp and not is_small(bound) and _is_reentrant(numerators):
        raise UsageError(
            f"model {job.spec.model.name}: checkpoints activations with use_reentrant=True, whose "
            "gradients DDP cannot sum over workers: pass use_reentrant=False, or set "
            "training.microbatch_size"
        )
    numerators.backward()
    try:
        _leave_compiler_out()
        optimizer = build_optimizer(job.spec, bound.named_parameters())
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise UsageError(
                f"optimizer {name}: its step asks for a closure that recomputes the loss, as "
                "LBFGS does; a step here computes it once: take another optimizer"
            )
        _step(optimizer)
    except InputError:
        raise
    except Exception as error:  # a user's optimizer can fail in any way
        raise UsageError(f"optimizer {name}: fails in its first step: {describe(error)}") from error


def _leave_compiler_out() -> None:
    """Optimizers are made without torch's compiler, whose import takes half of a check's time.

    Where it is not imported yet, torch imports it to keep out of this method, and remembers here
    what it calls instead.
    """
    method = inspect.unwrap(Optimizer.add_param_group)
    if not hasattr(method, "__dynamo_disable"):
        setattr(method, "__dynamo_disable", method)


def _step(optimizer: Optimizer) -> None:
    """One step; of torch's own optimizers without what imports the compiler."""
    kind = type(optimizer)
    if "step" in vars(optimizer) or not kind.__module__.startswith("torch.optim"):
        optimizer.step()
        return
    with torch.no_grad():
        inspect.unwrap(kind.step)(optimizer)


def _try_schedule(job: Job) -> None:
    """The learning rate's factor at the first step, after the warm-up, halfway and at the end."""
    schedule = job.spec.schedule
    last = max(job.num_steps - 1, 0)
    warmup = schedule.warmup_steps * (job.steps_per_epoch if schedule.by == "epoch" else 1)
    for step in sorted({0, min(warmup, last), last // 2, last}):
        where = f"schedule {schedule.name}: at step {step + 1} of {job.num_steps}"
        try:
            value = job.learning_rate_factor(step)
        except Exception as error:  # a user's schedule can fail in any way
            raise UsageError(f"{where} it fails: {describe(error)}") from error
        if not 0 <= value < math.inf:
            raise UsageError(f"{where} it gives {value:g}; a factor is finite and at least 0")


def _is_reentrant(result: torch.Tensor) -> bool:
    """Whether `torch.utils.checkpoint` with use_reentrant=True is on the way of the gradient."""
    seen = set()
    left = [result.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        if node.name() == "CheckpointFunctionBackward":
            return True
        seen.add(node)
        left += [following for following, _ in node.next_functions]
    return False
