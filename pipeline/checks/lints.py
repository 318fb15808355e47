"""What a job may do and its user rarely means: each a notice with what to change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from pipeline import registry
from pipeline.checks.batch import Notice
from pipeline.data.batch import Batch
from pipeline.data.columns import Field, Number
from pipeline.data.plan import Plan
from pipeline.data.streaming import Streamed
from pipeline.losses.targets import NoTarget, Signs, Values
from pipeline.losses.terms import Term
from pipeline.spec.split import HELD_OUT, Split
from pipeline.train.average import WeightAverage
from pipeline.train.job import Job

MAX_READS = 1.2
"""How often an epoch may read a streamed row before `check` says so."""
LEAST_WEIGHTS = 2
"""How many weights an equal average is of at least."""
MOST_LEFT = 0.01
"""Share of the initial weights in an average, from which on it is worth a word."""
LEAST_BATCHES = 4
"""How many batches a window of streamed blocks should hold."""


def unusual(job: Job, terms: list[Term], trial: Batch) -> list[Notice]:
    """What is allowed, and rarely meant."""
    spec = job.spec
    notices = []
    size, warmup = spec.training.batch_size, spec.schedule.warmup_steps
    if spec.schedule.by == "epoch":
        warmup *= job.steps_per_epoch
    if size > job.rows_per_epoch:
        text = f"{size} is more than the {job.rows_per_epoch} rows of an epoch: one step per epoch"
        notices.append(Notice("training.batch_size", text))
    if warmup > job.num_steps:
        text = f"{warmup} of {job.num_steps} steps: the learning rate never gets to its full value"
        notices.append(Notice("schedule.warmup_steps", text))
    if spec.workers.max and spec.workers.max > 1 and not spec.training.microbatch_size:
        text = "without training.microbatch_size a resize changes the curve's last bits"
        notices.append(Notice("workers", text))
    if isinstance(job.train, Streamed):
        notices += _lint_streaming(job.train.plan, size)
    notices += _lint_fractions(job)
    stop, most = spec.training.stop, -(-job.num_steps // job.steps_per_evaluation)
    if stop and stop.patience >= most:
        text = f"patience {stop.patience} of {most} evaluations: it never ends early"
        notices.append(Notice("training.stop", text))
    notices += _lint_average(job)
    patience = spec.schedule.options.get("patience", 0) if spec.schedule.is_plateau else 0
    if patience >= most:
        text = f"patience {patience} of {most} evaluations: the learning rate never falls"
        notices.append(Notice("schedule", text))
    notices += _lint_sampling(job)
    if spec.model.lora and spec.model.init_from is None:
        text = "without model.init_from: the weights that it adapts are random, and stay so"
        notices.append(Notice("model.lora", text))
    if passed := job.facts.index_columns:
        names = ", ".join(repr(name) for name in passed)
        text = f"{names}: the index that pandas wrote, not read; name it in data.inputs to read it"
        notices.append(Notice("data.inputs", text))
    notices += _lint_targets(job, terms)
    for field in job.fields:
        values = field.vocabulary or ()
        about = f"column {field.name!r}"
        profile = job.facts.profile.get(field.name, {})
        numeric = [value for value in values if isinstance(value, str) and _is_number(value)]
        if values and len(values) > 10 and len(numeric) > 0.9 * len(values):
            odd = next((value for value in values if value not in numeric), None)
            others = "other rows do not" if odd is None else f"others hold {odd!r}"
            text = f"text that is nearly all numbers, as {values[0]!r}; {others}"
            notices.append(Notice(about, text + ": read as categories"))
        elif field.is_input and len(values) > max(20, job.num_rows // 2):
            text = f"{len(values)} categories in {job.num_rows} rows: an id? it cannot generalise"
            notices.append(Notice(about, text))
        elif _counts_rows(job, field, profile, trial):
            text = "counts the rows, as an index does: the order of rows says nothing of new ones"
            notices.append(Notice(about, text))
        elif profile.get("distinct") == 1 or (
            isinstance(field, Number) and profile.get("min") == profile.get("max")
        ):
            notices.append(Notice(about, "holds one value in all training rows"))
        if field.is_target and isinstance(field, Number) and field.deviation == 1.0:
            spread = profile.get("deviation", 0.0)
            if spread > 50 and any(field in t.targets and type(t.target) is Values for t in terms):
                text = f"has a deviation of {spread:.3g}: data.target_scale: standard trains better"
                notices.append(Notice(f"target {field.name!r}", text))
    towers = [
        t.label for t in terms if len(t.loss.roles) > 1 and isinstance(t.target, NoTarget | Signs)
    ]
    if towers and registry.models[spec.model.name].build.__module__ == "pipeline.models":
        text = (
            f"{towers[0]} compares outputs, and those of {spec.model.name!r} all come from the "
            "same columns: write a model that puts each compared column through one encoder"
        )
        notices.append(Notice("model", text))
    return notices


def _lint_average(job: Job) -> Iterator[Notice]:
    """Averages of too few weights, or mainly of the initial ones."""
    average = job.spec.training.average
    if average is not None and average.ema is not None:
        left = average.ema**job.num_steps
        if left > MOST_LEFT:
            kept = f"{left:.0%} of the average are initial weights"
            text = f"{average.ema} over {job.num_steps} steps: {kept}, of a lower decay less"
            yield Notice("training.average.ema", text)
    if average is None or average.swa is None:
        return
    swa = WeightAverage(average, job.num_steps, job.steps_per_epoch)
    num_times = sum(map(swa.is_due, range(1, job.num_steps + 1)))
    if num_times < LEAST_WEIGHTS:
        text = f"averages the weights of {num_times} point{'s' if num_times != 1 else ''}"
        yield Notice("training.average.swa", f"{text}: let it start earlier, or more often")


def _lint_sampling(job: Job) -> Iterator[Notice]:
    """What drawing rows by class does to losses and probabilities."""
    sampling = job.spec.data.sampling
    if sampling is None or sampling.balance not in job.spec.data.targets:
        return
    for number, term in enumerate(job.spec.loss):
        for option in ("pos_weight", "class_weight"):
            if term.options.get(option) is not None:
                key = f"loss.{option}" if len(job.spec.loss) == 1 else f"loss.{number}.{option}"
                text = "data.sampling.balance makes up for rare classes already: use one of them"
                yield Notice(key, text)
    text = "probabilities are those of balanced classes, which log_loss and brier count as wrong"
    yield Notice("data.sampling.balance", f"{text}; training.threshold chooses where to decide")


def _lint_fractions(job: Job) -> Iterator[Notice]:
    """Where another share of the rows is held out than was asked for."""
    data, counts = job.spec.data, job.facts.rows
    drawn = [split for split in HELD_OUT if isinstance(data.held_out(split), float | Split)]
    total = counts["train"] + sum(counts[split] for split in drawn)
    rest = total - counts["test"] if "test" in drawn else total  # folds are cut from this
    for split in drawn:
        held_out = data.held_out(split)
        is_fold = isinstance(held_out, Split) and held_out.folds is not None
        share = counts[split] / (rest if is_fold else total)
        asked = held_out.share if isinstance(held_out, Split) and not held_out.time else held_out
        if not isinstance(asked, float):
            continue
        if abs(share - asked) > 5 * (asked * (1 - asked) / total) ** 0.5:
            why = "equal rows, and groups, stay on one side"
            text = f"{asked:g} asked for, {share:.3g} held out: {why}"
            yield Notice(f"data.{split}", text)


def _counts_rows(job: Job, field: Field, profile: dict[str, Any], trial: Batch) -> bool:
    """Whether an input of whole numbers has one for each row, without gaps."""
    if not (field.is_input and isinstance(field, Number)):
        return False
    if "int" not in field.arrow_type or profile.get("missing") or profile.get("count", 0) < 20:
        return False
    span = profile["max"] - profile["min"] + 1
    total = sum(job.facts.rows.values()) + job.facts.dropped
    if not 0.9 * total < span <= total:
        return False
    some = trial[field.name]
    return isinstance(some, torch.Tensor) and len(some.unique()) == len(some)  # type: ignore[no-untyped-call]


IN_TARGETS_UNIT = {"huber": "delta", "smooth_l1": "beta"}
"""Options of losses that are distances between targets."""


def _lint_targets(job: Job, terms: list[Term]) -> Iterator[Notice]:
    """What was done to target columns, and what it makes of a loss's options."""
    data = job.spec.data
    amounts = {field.name for term in terms if term.target.is_amount for field in term.targets}
    for field in job.fields:
        is_by_name = isinstance(data.target_scale, dict)
        if not field.is_target or not (field.is_amount or is_by_name):
            continue
        if field.name not in amounts and data.target_scale_of(field.name) != "none":
            losses = ", ".join(term.label for term in terms if field in term.targets)
            text = f"{losses} does not read it as an amount: data.target_scale leaves it as it is"
            yield Notice(f"target {field.name!r}", text)
            continue
        num_missing = job.facts.profile.get(field.name, {}).get("missing", 0)
        if field.fill is not None and num_missing:
            filled = f"{num_missing:,} missing values are filled with {field.fill:.6g}"
            text = f"{filled} and count as truth"
            yield Notice(f"target {field.name!r}", text)
        is_left = data.target_scale_of(field.name) != "none" and field.deviation == 1.0
        if is_left and job.facts.profile.get(field.name, {}).get("max") == 1.0:
            text = "holds 0 and 1 only: data.target_scale leaves it as it is"
            yield Notice(f"target {field.name!r}", text)
    asks_all = isinstance(data.target_scale, str) and data.target_scale != "none"
    if asks_all and not any(field.is_target and field.is_amount for field in job.fields):
        yield Notice("data.target_scale", "no target holds amounts: nothing is scaled")
    for term, asked in zip(terms, job.spec.loss, strict=True):
        option = IN_TARGETS_UNIT.get(asked.name)
        deviation = term.targets[0].deviation if term.targets else 1.0
        if option and isinstance(deviation, float) and deviation != 1.0:
            value = float(asked.options.get(option, 1.0))
            name = term.targets[0].name
            text = (
                f"{option} {value:g} is in units of data.target_scale, {value * deviation:.4g} in "
                f"those of {name!r}; {value / deviation:.4g} would be {value:g} of them"
            )
            yield Notice(f"loss {term.label}", text)


def _lint_streaming(plan: Plan, batch_size: int) -> Iterator[Notice]:
    if plan.reads_per_row > MAX_READS:
        group = max(plan.groups.values())
        text = (
            f"each row is read {plan.reads_per_row:.1f} times an epoch, as up to {group:,} rows "
            f"can only be read together: take a multiple of {group}"
        )
        yield Notice("data.stream.block_rows", text)
    blocks = len(plan.counts)
    if blocks <= plan.window:
        text = f"all {blocks} blocks are in one window: nothing is saved, take data.stream out"
        yield Notice("data.stream", text)
    elif sum(plan.counts) * plan.window < LEAST_BATCHES * batch_size * blocks:
        text = f"fewer than {LEAST_BATCHES} batches in a window: workers fetch blocks repeatedly"
        yield Notice("data.stream.window", text)


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "."))
    except ValueError:
        return False
    return True
