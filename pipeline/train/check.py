"""All that can be known of a job before it trains, each fault with what to change."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from pipeline import registry
from pipeline.data.batch import Batch, num_rows, select
from pipeline.data.columns import Field, Number
from pipeline.data.partition import split_batch
from pipeline.data.plan import Plan
from pipeline.data.streaming import Streamed
from pipeline.distributed.ordered import is_small
from pipeline.errors import InputError, UsageError
from pipeline.losses import fit as fitting
from pipeline.losses.objective import Objective
from pipeline.losses.targets import NoTarget, Signs, Values
from pipeline.losses.terms import Term
from pipeline.suspects.modules import rewritten
from pipeline.tracebacks import described
from pipeline.train.best import Best
from pipeline.train.evaluate import chosen, try_metrics
from pipeline.train.job import Job, build_optimizer, objective, of_model, trial_batch

MOST_READS = 1.2
"""Of each streamed row in an epoch, above which `check` says so."""
LEAST_BATCHES = 4


def check(job: Job) -> list[fitting.Notice]:
    """Everything that can be known before training. Raises ContractError with the fix."""
    targets = [field.name for field in job.fields if field.is_target]
    trial = trial_batch(job)
    bound = objective(job.spec, job.fields, trial)
    for rows in (job.train, job.validation):
        for batch in rows.parts(targets) if rows is not None and targets else ():
            fitting.check_targets(bound.terms, batch)
    metrics = chosen(bound.terms, job.spec.metrics)
    try:
        notices = fitting.check_batch(bound, trial)
        if job.validation:
            try_metrics(bound, job.validation, metrics, job.spec.training.batch_size)
    except InputError:
        raise
    except Exception as error:  # as above: a user's model can fail in any way
        raise of_model(
            job.spec.model.name, error, bound.inputs, "fails on the first rows: "
        ) from error
    if job.spec.training.best_by:
        Best(job.spec.training.best_by, bound.terms, metrics)
    notices += _rewriting(job, bound, trial)
    notices += [_averaged(bound, name) for name, adds_up in bound.changing.items() if not adds_up]
    _try_smallest(job, bound, trial)
    _try_step(job, bound, trial)
    return notices + _oddities(job, bound.terms, trial)


def _averaged(bound: Objective, name: str) -> fitting.Notice:
    is_mean = bound.get_buffer(name).is_floating_point() or bound.get_buffer(name).is_complex()
    taken = "the mean" if is_mean else "the largest"
    text = (
        f"buffer {name!r} changes in forward passes, and not by a sum over rows: of what "
        f"micro-batches make of it {taken} is taken, so it depends on training.microbatch_size"
    )
    return fitting.Notice("model", text)


def _rewriting(job: Job, bound: Objective, trial: Batch) -> list[fitting.Notice]:
    """Whether a forward pass writes into weights: workers see other rows, and would part.

    Raises UsageError where there are several.
    """
    bound.train()
    name = rewritten(bound, trial)
    if name is None:
        return []
    text = (
        f"writes its parameter {name!r} in the forward pass, as an Embedding with max_norm does: "
        "each micro-batch would do so by its own rows"
    )
    if job.spec.workers.most > 1:
        fix = "compute with a changed copy, or change it in an own optimizer's step"
        raise UsageError(f"model {job.spec.model.name}: {text}, each worker too: {fix}")
    return [fitting.Notice("model", f"{text}; it cannot train on several workers")]


def _try_smallest(job: Job, bound: Objective, trial: Batch) -> None:
    """The smallest micro-batch of an epoch through the model, as BatchNorm refuses one row."""
    settings, most = job.spec.training, job.spec.workers.most
    last = job.num_rows % settings.batch_size or settings.batch_size
    sizes = (min(settings.batch_size, job.num_rows), last)
    parts = [
        part for n in sizes for part in split_batch(np.arange(n), settings.microbatch_size, most)
    ]
    size = min(map(len, parts))
    try:
        bound.train()
        with torch.no_grad():
            bound.predict(select(trial, torch.arange(min(size, num_rows(trial)))))
    except Exception as error:
        raise UsageError(
            f"model {job.spec.model.name}: fails on {size} row{'s' if size > 1 else ''}, which the "
            f"smallest micro-batch of an epoch has: {described(error)}\n  {job.num_rows} rows, "
            f"training.batch_size {settings.batch_size}, microbatch_size "
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
        optimizer = build_optimizer(job.spec, bound.parameters())
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise UsageError(
                f"optimizer {name}: its step asks for a closure that computes the loss again, as "
                "LBFGS does; a step here computes it once: take another optimizer"
            )
        optimizer.step()
    except InputError:
        raise
    except Exception as error:  # a user's optimizer can fail in any way
        raise UsageError(
            f"optimizer {name}: fails in its first step: {described(error)}"
        ) from error


def _is_reentrant(result: torch.Tensor) -> bool:
    """Whether `torch.utils.checkpoint` with use_reentrant=True is on the way of the gradient."""
    seen, left = set(), [result.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        if node.name() == "CheckpointFunctionBackward":
            return True
        seen.add(node)
        left += [following for following, _ in node.next_functions]
    return False


def _oddities(job: Job, terms: list[Term], trial: Batch) -> list[fitting.Notice]:
    """What is allowed, and rarely meant."""
    spec, found = job.spec, []
    size, warmup = spec.training.batch_size, spec.schedule.warmup_steps
    if size > job.num_rows:
        text = f"{size} is more than the {job.num_rows} training rows: one step per epoch"
        found.append(fitting.Notice("training.batch_size", text))
    if warmup > job.num_steps:
        text = f"{warmup} of {job.num_steps} steps: the learning rate never gets to its full value"
        found.append(fitting.Notice("schedule.warmup_steps", text))
    if spec.workers.max and spec.workers.max > 1 and not spec.training.microbatch_size:
        text = "without training.microbatch_size a resize changes the curve's last bits"
        found.append(fitting.Notice("workers", text))
    if isinstance(job.train, Streamed):
        found += _of_streaming(job.train.plan, size)
    asked, held = spec.data.validation, job.num_validation_rows
    if isinstance(asked, float):
        share, number = held / (held + job.num_rows), held + job.num_rows
        if abs(share - asked) > 5 * (asked * (1 - asked) / number) ** 0.5:
            text = f"{asked:g} asked for, {share:.3g} held out: equal rows stay on one side"
            found.append(fitting.Notice("data.validation", text))
    if passed := job.facts.get("passed"):
        names = ", ".join(repr(name) for name in passed)
        text = f"{names}: the index that pandas wrote, left out; name it in data.inputs to read it"
        found.append(fitting.Notice("data.inputs", text))
    found += _of_targets(job, terms)
    for field in job.fields:
        values, about = field.vocabulary or (), f"column {field.name!r}"
        profile = job.facts["profile"].get(field.name, {})
        numbers = [value for value in values if isinstance(value, str) and _is_number(value)]
        if values and len(values) > 10 and len(numbers) > 0.9 * len(values):
            odd = next((value for value in values if value not in numbers), values[0])
            text = f"text that is nearly all numbers, as {values[0]!r}; others hold {odd!r}"
            found.append(fitting.Notice(about, text + ": read as categories"))
        elif field.is_input and len(values) > max(20, job.num_rows // 2):
            text = f"{len(values)} categories in {job.num_rows} rows: an id? it cannot generalise"
            found.append(fitting.Notice(about, text))
        elif _counts_rows(job, field, profile, trial):
            text = "counts the rows, as an index does: the order of rows says nothing of new ones"
            found.append(fitting.Notice(about, text))
        elif profile.get("distinct") == 1 or (
            isinstance(field, Number) and profile.get("min") == profile.get("max")
        ):
            found.append(fitting.Notice(about, "holds one value in all training rows"))
        if field.is_target and isinstance(field, Number) and field.deviation == 1.0:
            spread = profile.get("deviation", 0.0)
            if spread > 50 and any(field in t.targets and type(t.target) is Values for t in terms):
                text = f"has a deviation of {spread:.3g}: data.target_scale: standard trains better"
                found.append(fitting.Notice(f"target {field.name!r}", text))
    towers = [
        t.label for t in terms if len(t.loss.roles) > 1 and isinstance(t.target, NoTarget | Signs)
    ]
    if towers and registry.models[spec.model.name].build.__module__ == "pipeline.models":
        text = (
            f"{towers[0]} compares outputs, and those of {spec.model.name!r} all come from the "
            "same columns: write a model that puts each compared column through one encoder"
        )
        found.append(fitting.Notice("model", text))
    return found


def _counts_rows(job: Job, field: Field, profile: dict[str, Any], trial: Batch) -> bool:
    """Whether an input of whole numbers has one for each row, without gaps."""
    if not (field.is_input and isinstance(field, Number)):
        return False
    if "int" not in field.arrow_type or profile.get("missing") or profile.get("count", 0) < 20:
        return False
    span = profile["max"] - profile["min"] + 1
    total = job.num_rows + job.num_validation_rows + job.facts["dropped"]
    if not 0.9 * total < span <= total:
        return False
    some = trial[field.name]
    return isinstance(some, torch.Tensor) and len(some.unique()) == len(some)  # type: ignore[no-untyped-call]


IN_TARGETS_UNIT = {"huber": "delta", "smooth_l1": "beta"}
"""Options of losses that are distances between targets."""


def _of_targets(job: Job, terms: list[Term]) -> Iterator[fitting.Notice]:
    """What was done to target columns, and what it makes of a loss's options."""
    data = job.spec.data
    for field in job.fields:
        if not field.is_target or not field.is_amount:
            continue
        number = job.facts["profile"].get(field.name, {}).get("missing", 0)
        if field.fill is not None and number:
            text = f"{number:,} missing values are filled with {field.fill:.6g} and count as truth"
            yield fitting.Notice(f"target {field.name!r}", text)
        is_left = data.target_scale_of(field.name) != "none" and field.deviation == 1.0
        if is_left and job.facts["profile"].get(field.name, {}).get("max") == 1.0:
            text = "holds 0 and 1 only: data.target_scale leaves it as it is"
            yield fitting.Notice(f"target {field.name!r}", text)
    for term, asked in zip(terms, job.spec.loss, strict=True):
        option = IN_TARGETS_UNIT.get(asked.name)
        deviation = term.targets[0].deviation if term.targets else 1.0
        if option and isinstance(deviation, float) and deviation != 1.0:
            value, name = float(asked.options.get(option, 1.0)), term.targets[0].name
            text = (
                f"{option} {value:g} is in units of data.target_scale, {value * deviation:.4g} in "
                f"those of {name!r}; {value / deviation:.4g} would be {value:g} of them"
            )
            yield fitting.Notice(f"loss {term.label}", text)


def _of_streaming(plan: Plan, batch_size: int) -> Iterator[fitting.Notice]:
    if plan.reads_per_row > MOST_READS:
        group = max(plan.groups.values())
        text = (
            f"each row is read {plan.reads_per_row:.1f} times an epoch, as up to {group:,} rows "
            f"can only be read together: take a multiple of {group}"
        )
        yield fitting.Notice("data.stream.block_rows", text)
    blocks = len(plan.counts)
    if blocks <= plan.window:
        text = f"all {blocks} blocks are in one window: nothing is saved, take data.stream out"
        yield fitting.Notice("data.stream", text)
    elif sum(plan.counts) * plan.window < LEAST_BATCHES * batch_size * blocks:
        text = f"fewer than {LEAST_BATCHES} batches in a window: workers fetch blocks repeatedly"
        yield fitting.Notice("data.stream.window", text)


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "."))
    except ValueError:
        return False
    return True
