"""Loss and metrics of the validation rows, exact over all workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.data.batch import Batch, to_device
from pipeline.data.dataset import Buffer, Dataset
from pipeline.data.partition import worker_range
from pipeline.data.sampler import Rows
from pipeline.distributed import comm
from pipeline.distributed.seeds import Seeds
from pipeline.losses.modes import evaluating
from pipeline.losses.objective import Objective
from pipeline.losses.terms import Term
from pipeline.metrics import CONFUSION, Metric
from pipeline.rundir.records import Numbers
from pipeline.train.term_metrics import Baseline, TermMetric

MAX_CLASSES = 1000
"""Predictions of each class are counted for targets with no more classes than this."""


class Evaluation(NamedTuple):
    """What one look at the validation rows gives."""

    values: Numbers
    """`loss`, `loss/<term>` where there are several, and each metric; None without any item."""
    baselines: Numbers
    """The metrics that a constant prediction has, where they were asked for."""
    notes: list[str]
    """What the values do not show, such as that one class is predicted for all rows."""


@torch.no_grad()  # not inference_mode: a model may keep what it computed, as RoPE caches
def evaluate(
    objective: Objective,
    dataset: Dataset,
    rows: Rows,
    batch_size: int,
    metrics: Sequence[TermMetric],
    device: torch.device,
    baselines: Sequence[Baseline] = (),
) -> Evaluation:
    """Loss and metrics over all of these rows, the same on every worker.

    A loss that couples rows is that of each `batch_size` rows, averaged over rows.
    """
    terms = objective.terms
    counted = [*metrics, *baselines, *_tallies(terms)]
    sizes = [metric.num_sums(objective) for metric in counted]
    starts = range(0, len(rows), batch_size)
    sums_by_batch: dict[int, Tensor] = {}
    buffer = Buffer(dataset.layout, min(batch_size, len(rows)), device.type == "cuda")
    seeds = Seeds(0, device)
    with evaluating(objective):
        for index in worker_range(len(starts), comm.rank(), comm.num_workers()):
            seeds.set(0, index)  # for a model that draws even here
            batch = dataset.gather(rows[starts[index] : starts[index] + batch_size], buffer)
            sums_by_batch[index] = _sums(objective, batch, counted, sizes, device)
    num_terms = len(terms)
    totals = comm.sum_by_index(sums_by_batch, len(starts), 2 * num_terms + sum(sizes))
    numerators, denominators, *sums = torch.split(totals, [num_terms, num_terms, *sizes])
    values = _losses(terms, numerators, denominators)
    both = list(zip(counted, sums, strict=True))
    first, last = len(metrics), len(metrics) + len(baselines)
    values |= {metric.name: metric.value(s) for metric, s in both[:first]}
    constant: Numbers = {metric.name: metric.value(s) for metric, s in both[first:last]}
    notes = [_explain_collapse(terms[tally.index], counts) for tally, counts in both[last:]]
    return Evaluation(values, constant, [note for note in notes if note])


def _sums(
    objective: Objective,
    batch: Batch,
    metrics: Sequence[TermMetric],
    sizes: list[int],
    device: torch.device,
) -> Tensor:
    """Numerators, denominators and sums of the metrics of one batch: float64 vector."""
    denominators = objective.denominators(batch)
    batch = to_device(batch, device)
    predictions = objective.predict(batch)
    items = objective.items(predictions, batch)
    parts = [torch.stack([item.double().sum() for item in items]).cpu(), denominators]
    for metric, size in zip(metrics, sizes, strict=True):
        prediction, truth = metric.comparable(objective, predictions, batch)
        parts.append(metric.sums(prediction, truth, size).cpu())
    return torch.cat(parts)


def _losses(terms: list[Term], numerators: Tensor, denominators: Tensor) -> Numbers:
    """`loss`, and each of several terms; a term without any item leaves no sum of them."""
    losses = [
        n / d if d > 0 else None
        for n, d in zip(numerators.tolist(), denominators.tolist(), strict=True)
    ]
    weighted = [t.weight * v for t, v in zip(terms, losses, strict=True) if v is not None]
    values: Numbers = {}
    if len(terms) > 1:
        values |= {f"loss/{t.label}": v for t, v in zip(terms, losses, strict=True)}
    values["loss"] = sum(weighted) if len(weighted) == len(terms) else None
    return values


def _tallies(terms: list[Term]) -> list[TermMetric]:
    """How many items are predicted to be, and are, of each class, for each term of few classes."""
    return [
        TermMetric(f"tally of {term.label}", TALLY, index)
        for index, term in enumerate(terms)
        if term.target.task(term) in TALLY.tasks and term.targets[0].num_codes <= MAX_CLASSES
    ]


def _count_classes(prediction: Tensor, truth: Tensor) -> Tensor:
    """Items that are predicted to be, and that are, of each class: float64 [2 C]."""
    is_binary = truth.dtype == torch.bool
    num_classes = 2 if is_binary else prediction.shape[1]
    labels = prediction if is_binary else prediction.argmax(1)
    counts = [
        torch.bincount(each.long().flatten(), minlength=num_classes) for each in (labels, truth)
    ]
    return torch.cat(counts).double()


TALLY = Metric(("classes", "binary"), _count_classes, lambda sums: 0.0, reads=CONFUSION)


def _explain_collapse(term: Term, counts: Tensor) -> str:
    """That one class is predicted for all items although there are others; or nothing."""
    predicted, actual = counts.reshape(2, -1)
    chosen = int(predicted.argmax())
    if not predicted.any() or predicted[chosen] < predicted.sum() or actual[chosen] == actual.sum():
        return ""
    vocabulary: Sequence[Any] = term.targets[0].vocabulary or range(len(predicted))
    label = vocabulary[chosen] if chosen < len(vocabulary) else chosen
    share = float(actual[chosen] / actual.sum())
    return f"{term.label} predicts only {label!r}; {share:.1%} of the validation rows are {label!r}"
