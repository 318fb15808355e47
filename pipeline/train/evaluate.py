"""Loss and metrics of held-out rows, exact over all workers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
from pipeline.losses.targets import Items
from pipeline.losses.terms import Term
from pipeline.metrics import Metric, Reads
from pipeline.metrics.classification import CONFUSION
from pipeline.rundir.records import Numbers
from pipeline.spec.sections import Training
from pipeline.train.baselines import Baseline
from pipeline.train.gathered import MAX_GATHERED, GatheredItems, values_of_all
from pipeline.train.term_metrics import Reading, TermMetric

MOST_TELLING: tuple[Reads, ...] = ("probabilities", "scores", "amounts")
MAX_KEPT = 2_000_000
"""Predicted numbers of a term that are kept; of more, those of every so many batches."""
MAX_CLASSES = 1000
"""Predictions of each class are counted for targets with no more classes than this."""


TOO_MANY = f"{{}} has no value: it needs all predictions at once, more than {MAX_GATHERED:,}"


class Evaluation(NamedTuple):
    """What one look at the validation rows gives."""

    values: Numbers
    """`loss`, `loss/<term>` where there are several, and each metric; None without any item."""
    baselines: Numbers
    """The metrics that a constant prediction has, where they were asked for."""
    notes: list[str]
    """What the values do not show, such as that one class is predicted for all rows."""
    kept: Mapping[int, Items]
    """Predictions by the term's index, of all rows or of a sample, where they were asked for."""


@torch.no_grad()  # not inference_mode: a model may keep what it computed, as RoPE caches
def evaluate(
    objective: Objective,
    dataset: Dataset,
    rows: Rows,
    batch_size: int,
    metrics: Sequence[TermMetric],
    device: torch.device,
    baselines: Sequence[Baseline] = (),
    keep: bool = False,
) -> Evaluation:
    """Loss and metrics over all of these rows, the same on every worker.

    A loss that couples rows is that of each `batch_size` rows, averaged over rows. With `keep` the
    evaluation has predictions too, of all rows or of a sample.
    """
    terms = objective.terms
    tallies = _tallies(terms)
    chosen = [*metrics, *baselines, *tallies]
    summed = [one for one in chosen if not one.needs_all]
    whole = [one for one in chosen if one.needs_all]
    starts = range(0, len(rows), batch_size)
    sizes = {one: one.size(objective) for one in summed}
    sums_by_batch: dict[int, Tensor] = {}
    gathered = GatheredItems({one.reading: 1 for one in whole})
    kept = GatheredItems(_choose_kept(objective, len(rows), len(starts)) if keep else {})
    readings = dict.fromkeys([*(one.reading for one in chosen), *kept.readings])
    buffer = Buffer(dataset.layout, min(batch_size, len(rows)), device.type == "cuda")
    seeds = Seeds(0, device)
    with evaluating(objective):
        for index in worker_range(len(starts), comm.rank(), comm.num_workers()):
            seeds.set(0, index)  # for a model that draws even here
            here = rows[starts[index] : starts[index] + batch_size]
            batch: Batch = dataset.gather(here, buffer)
            denominators = objective.denominators(batch)
            batch = to_device(batch, device)
            predictions = objective.predict(batch)
            losses = [loss.double().sum() for loss in objective.items(predictions, batch)]
            are_nan = [_is_nan(term, predictions) for term in terms]
            row = torch.from_numpy(here)
            items = {each: each.items(objective, predictions, batch, row) for each in readings}
            sums = [one.sums(items[one.reading], size).cpu() for one, size in sizes.items()]
            sums_by_batch[index] = torch.cat(
                [torch.stack(losses).cpu(), denominators, torch.stack(are_nan).cpu(), *sums]
            )
            gathered.add(index, items)
            kept.add(index, items)
    lengths = [*3 * [len(terms)], *sizes.values()]
    totals = comm.sum_by_index(sums_by_batch, len(starts), sum(lengths))
    numerator, denominator, num_nan, *sums = torch.split(totals, lengths)
    total = dict(zip(summed, sums, strict=True))
    value: dict[TermMetric, float | None] = {one: one.value(total[one]) for one in summed}
    value |= values_of_all(whole, gathered.gather(len(starts)))
    for one in metrics:
        if num_nan[one.reading.term] and value[one] is not None:
            value[one] = math.nan  # which labels, ranks and medians would not show
    values = _losses(terms, numerator, denominator) | {one.name: value[one] for one in metrics}
    constant: Numbers = {one.name: value[one] for one in baselines}
    notes = [_explain_collapse(terms[one.reading.term], total[one]) for one in tallies]
    notes += [TOO_MANY.format(one.name) for one in metrics if value[one] is None]
    predictions_kept = {
        reading.term: items for reading, items in kept.gather(len(starts)).items() if items
    }
    return Evaluation(values, constant, [note for note in notes if note], predictions_kept)


def rows_at_once(objective: Objective, settings: Training) -> int:
    """How many rows an evaluation computes together: a micro-batch, or all that losses couple."""
    size = settings.batch_size if objective.is_coupled else settings.microbatch_size
    return size or settings.batch_size


def _is_nan(term: Term, predictions: Mapping[str, Tensor]) -> Tensor:
    """Whether any prediction of the term is not a number: 1 or 0."""
    found = [tensor.isnan().any() for tensor in term.read(predictions)]
    return torch.stack(found).any().double()


def _choose_kept(objective: Objective, num_rows: int, num_batches: int) -> dict[Reading, int]:
    """What is kept of each term, and of which batches: every one, or every so many."""
    chosen = {}
    for index, term in enumerate(objective.terms):
        task = term.target.task(term)
        if task is None or task == "survival":
            continue  # there is no picture of it
        if not all(field.is_single for field in term.targets if task == "classes"):
            continue  # of positions there are too many
        readable = term.target.readable(term)
        reads = next((one for one in MOST_TELLING if one in readable), None)
        if reads is None:
            continue
        reading = Reading(index, task, reads, False)
        width = math.prod(reading.no_items(objective).prediction.shape[1:])
        chosen[reading] = min(math.ceil(num_rows * width / MAX_KEPT), num_batches)
    return chosen


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
    tallies = []
    for index, term in enumerate(terms):
        task = term.target.task(term)
        if task in TALLY.tasks and term.targets[0].num_codes <= MAX_CLASSES:
            assert task is not None
            reading = Reading(index, task, CONFUSION[task], False)
            tallies.append(TermMetric(f"tally of {term.label}", TALLY, reading))
    return tallies


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
    return f"{term.label} predicts only {label!r}; {share:.1%} of the rows are {label!r}"
