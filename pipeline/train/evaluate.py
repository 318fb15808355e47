"""Loss and metrics of the validation rows, exact over all workers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline import registry
from pipeline.data.batch import Batch, Ragged, moved
from pipeline.data.columns import IGNORED
from pipeline.data.order import Rows, owned
from pipeline.data.store import Buffer, Store
from pipeline.errors import UsageError
from pipeline.losses.objective import Objective
from pipeline.losses.terms import Term
from pipeline.metrics import CONFUSION, DEFAULTS, Metric, Task
from pipeline.train import reduce
from pipeline.train.step import seed_device, seed_for

MOST_CLASSES = 1000
"""Of a target, up to which predictions of each are counted."""
NO_TASK = '\n  give a loss of your own a task: register it with like="mse" or another'
Named = dict[str, tuple[int, Metric]]
"""Metrics by their name in the record, each with the number of its term."""


def chosen(terms: list[Term], names: list[str] | None) -> Named:
    """The metrics of each term: those named, or what its task usually wants.

    Raises UsageError for a metric that fits none of the terms.
    """
    found: Named = {}
    tasks = [_task(term) for term in terms]
    wanted = {n for task in tasks if task for n in DEFAULTS[task]} if names is None else set(names)
    for name in sorted(wanted):
        metric = _built(name)
        fitting = [i for i, task in enumerate(tasks) if task in metric.tasks]
        if not fitting and names is not None:
            kinds = ", ".join(
                f"{t.label} ({k or 'no task'})" for t, k in zip(terms, tasks, strict=True)
            )
            raise UsageError(
                f"metrics: {name} is for {' and '.join(metric.tasks)}, the losses are {kinds}"
                f"{NO_TASK if None in tasks else ''}"
            )
        for i in fitting:
            found[name if len(fitting) == 1 else f"{terms[i].label}/{name}"] = (i, metric)
    return found


def _built(name: str) -> Metric:
    entry = registry.metrics[name]
    try:
        made = entry.build()
    except TypeError:
        made = None
    if not isinstance(made, Metric):
        raise UsageError(
            f"metrics: {name} ({entry.place}) must be a function without arguments that returns a "
            "Metric: sums that add up over rows, and their value"
        )
    silent = [t for t in made.tasks if t != "values" and made.reading(t) is None]
    if silent:
        raise UsageError(
            f"metrics: {name} ({entry.place}) does not say what it reads for {silent[0]}: "
            'Metric(..., reads="labels"), or reads="probabilities"'
        )
    return made


def _task(term: Term) -> Task | None:
    if term.loss.target == "classes":
        return "classes"
    if term.loss.target in ("binary", "signs"):
        return "binary" if term.loss.shape == "as_target" else None
    if term.loss.target in ("values", "counts"):
        return "values"
    numbers = all(field.kind == "number" for field in term.targets)
    return "values" if term.loss.target == "any" and term.targets and numbers else None


@torch.no_grad()  # not inference_mode: a model may keep what it computed, as RoPE caches
def evaluate(
    objective: Objective,
    store: Store,
    rows: Rows,
    batch_size: int,
    metrics: Named,
    device: torch.device,
    said: list[str] | None = None,
) -> dict[str, float | None]:
    """`loss`, `loss/<term>` and each metric over all validation rows; None without any item.

    A loss that couples rows is that of each `batch_size` rows, averaged over rows. What the values
    do not show, such as that one class is predicted for all rows, is appended to `said`.
    """
    was_training = objective.training
    objective.eval()
    asked, metrics = metrics, metrics | (_tallies(objective.terms) if said is not None else {})
    sizes = [_num_sums(objective, *metrics[name]) for name in metrics]
    num_terms, starts = len(objective.terms), range(0, len(rows), batch_size)
    parts: dict[int, Tensor] = {}
    buffer = Buffer(store.layout, min(batch_size, len(rows)), device.type == "cuda")
    for number in owned(len(starts), reduce.rank(), reduce.num_workers()):
        start = starts[number]
        seed_device(seed_for(0, 0, number), device)  # for a model that draws even here
        batch = store.gather(rows[start : start + batch_size], buffer)
        parts[number] = _sums(objective, batch, metrics, device)
    objective.train(was_training)
    whole = reduce.summed(parts, len(starts), 2 * num_terms + sum(sizes))
    pieces = np.split(whole.numpy(), np.cumsum([num_terms, num_terms, *sizes])[:-1])
    numerators, denominators, *counted = pieces
    found: dict[str, float | None] = {}
    losses = [
        float(n / d) if d > 0 else None for n, d in zip(numerators, denominators, strict=True)
    ]
    if num_terms > 1:
        found |= {f"loss/{t.label}": v for t, v in zip(objective.terms, losses, strict=True)}
    found["loss"] = None  # a term without any item would make the sum another one
    if None not in losses:
        weighted = [
            t.weight * v for t, v in zip(objective.terms, losses, strict=True) if v is not None
        ]
        found["loss"] = sum(weighted)
    for (name, (number, metric)), part in zip(metrics.items(), counted, strict=True):
        if name in asked:
            found[name] = metric.value(torch.from_numpy(part))
        elif said is not None and (text := _collapsed(objective.terms[number], part)):
            said.append(text)
    return found


def _tallies(terms: list[Term]) -> Named:
    """For each term of few classes, how many items are predicted to be, and are, of each."""
    return {
        f"tally of {term.label}": (number, TALLY)
        for number, term in enumerate(terms)
        if _task(term) in ("classes", "binary") and term.targets[0].num_codes <= MOST_CLASSES
    }


def _tally(prediction: Tensor, truth: Tensor) -> Tensor:
    is_binary = truth.dtype == torch.bool
    number = 2 if is_binary else prediction.shape[1]
    labels = prediction if is_binary else prediction.argmax(1)
    both = [torch.bincount(each.long().flatten(), minlength=number) for each in (labels, truth)]
    return torch.cat(both).double()


TALLY = Metric(("classes", "binary"), _tally, lambda sums: 0.0, reads=CONFUSION)


def _collapsed(term: Term, counts: NDArray[np.float64]) -> str:
    """That one class is predicted for all items although there are others; or nothing."""
    predicted, actual = counts.reshape(2, -1)
    chosen = int(predicted.argmax())
    if not predicted.any() or predicted[chosen] < predicted.sum() or actual[chosen] == actual.sum():
        return ""
    vocabulary: Sequence[Any] = term.targets[0].vocabulary or range(len(predicted))
    label = vocabulary[chosen] if chosen < len(vocabulary) else chosen
    share = actual[chosen] / actual.sum()
    return f"{term.label} predicts only {label!r}; {share:.1%} of the validation rows are {label!r}"


def _sums(objective: Objective, batch: Batch, metrics: Named, device: torch.device) -> Tensor:
    """Numerators, denominators and sums of the metrics of one batch: float64 vector."""
    denominators = objective.denominators(batch)
    batch = moved(batch, device)
    predictions = objective.predict(batch)
    items = objective.items(predictions, batch)
    parts = [torch.stack([item.double().sum() for item in items]).cpu(), denominators]
    for number, metric in metrics.values():
        both = _comparable(objective, number, metric, predictions, batch)
        parts.append(metric.sums(*both).cpu())
    return torch.cat(parts)


def _comparable(
    objective: Objective, number: int, metric: Metric, predictions: dict[str, Tensor], batch: Batch
) -> tuple[Tensor, Tensor]:
    """Served prediction and truth as the metric takes them."""
    term = objective.terms[number]
    served = term.served(objective.head(number), predictions)
    truth = term.truth(batch, predictions[term.outputs[0]])[0]
    assert not isinstance(truth, Ragged)
    if term.loss.target == "classes":
        kept = truth != IGNORED
        served = served.movedim(1, -1)[kept]
        return served.argmax(1) if metric.reading("classes") == "labels" else served, truth[kept]
    if term.loss.target in ("binary", "signs"):
        threshold = 0.5 if term.loss.target == "binary" else 0.0
        is_labels = metric.reading("binary") == "labels"
        return served > threshold if is_labels else served, truth > threshold
    return tuple(  # type: ignore[return-value]
        unscaled(term, values, metric.centered).reshape(len(values), -1)
        for values in (served, truth)
    )


def unscaled(term: Term, values: Tensor, centered: bool = False) -> Tensor:
    """Values in the unit of the target columns; `centered`, less their training mean."""

    def stacked(amounts: list[Any]) -> Tensor:
        made = values.new_tensor(amounts, dtype=torch.float64)
        return made[0] if len(amounts) == 1 else made

    mean = stacked([field.mean for field in term.targets])
    if centered:
        mean = mean - stacked([field.center for field in term.targets])
    return values.double() * stacked([field.deviation for field in term.targets]) + mean


def _num_sums(objective: Objective, number: int, metric: Metric) -> int:
    """How many sums the metric has for this term: a worker without rows must send as many."""
    term = objective.terms[number]
    if term.loss.target == "classes":
        width = objective.sizes[term.outputs[0]] or 1
        if term.loss.head is not None:
            width = term.targets[0].num_codes
        is_labels = metric.reading("classes") == "labels"
        numbers = torch.zeros(0, dtype=torch.int64)
        like = numbers if is_labels else torch.zeros(0, width), numbers
    elif term.loss.target in ("binary", "signs"):
        truth = torch.zeros(0, dtype=torch.bool)
        like = truth if metric.reading("binary") == "labels" else torch.zeros(0), truth
    else:
        shape = term.targets[0].shape if len(term.targets) == 1 else (len(term.targets),)
        like = torch.zeros(0, math.prod(shape)), torch.zeros(0, math.prod(shape))
    return metric.sums(*like).numel()
