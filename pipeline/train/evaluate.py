"""Loss and metrics of the validation rows, exact over all workers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline import registry
from pipeline.data.batch import Batch, Ragged, to_device
from pipeline.data.dataset import Buffer, Dataset
from pipeline.data.partition import worker_range
from pipeline.data.sampler import Rows
from pipeline.distributed import comm
from pipeline.distributed.seeds import Seeds
from pipeline.errors import UsageError
from pipeline.losses.modes import evaluating
from pipeline.losses.objective import Objective
from pipeline.losses.terms import Term
from pipeline.metrics import CONFUSION, DEFAULTS, Metric
from pipeline.tracebacks import describe, noting

MOST_CLASSES = 1000
"""Of a target, up to which predictions of each are counted."""
FEW_ROWS = 64
"""On which metrics are tried before training."""
NO_TASK = '\n  give a loss of your own a task: register it with like="mse" or another'
Named = dict[str, tuple[int, Metric]]
"""Metrics by their name in the record, each with the number of its term."""


def choose_metrics(terms: list[Term], names: list[str] | None) -> Named:
    """The metrics of each term: those named, or what its task usually wants.

    Raises UsageError for a metric that fits none of the terms.
    """
    metrics_by_name: Named = {}
    tasks = [term.target.task(term) for term in terms]
    wanted = {n for task in tasks if task for n in DEFAULTS[task]} if names is None else set(names)
    for name in sorted(wanted):
        metric = _build_metric(name)
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
            metrics_by_name[name if len(fitting) == 1 else f"{terms[i].label}/{name}"] = (i, metric)
    return metrics_by_name


def _build_metric(name: str) -> Metric:
    entry = registry.metrics[name]
    try:
        metric = entry.build()
    except TypeError:
        metric = None
    if not isinstance(metric, Metric):
        raise UsageError(
            f"metrics: {name} ({entry.place}) must be a function without arguments that returns a "
            "Metric: sums that add up over rows, and their value"
        )
    if odd := [task for task in metric.tasks if task not in DEFAULTS]:
        raise UsageError(
            f"metrics: {name} ({entry.place}) is for {odd[0]!r}; tasks are {', '.join(DEFAULTS)}, "
            'given as a tuple: Metric(("values",), ...)'
        )
    silent = [t for t in metric.tasks if t != "values" and metric.reading(t) is None]
    if silent:
        raise UsageError(
            f"metrics: {name} ({entry.place}) does not say what it reads for {silent[0]}: "
            'Metric(..., reads="labels"), or reads="probabilities"'
        )
    return metric


@torch.no_grad()
def try_metrics(objective: Objective, store: Dataset, metrics: Named, most: int) -> None:
    """Ask each metric about the first validation rows, `most` of them, whole and in two parts.

    Raises UsageError for one that fails, or whose sums do not add up: it would have another value
    on another number of workers.
    """
    batch = store.gather(np.arange(min(len(store), FEW_ROWS, most)))
    with evaluating(objective):
        predictions = objective.predict(batch)
    for name, (index, metric) in metrics.items():
        try:
            prediction, truth = _comparable(objective, index, metric, predictions, batch)
            size = _num_sums(objective, index, name, metric)
            half = len(truth) // 2
            whole = _add_up(name, metric, prediction, truth, size)
            parts = [
                _add_up(name, metric, prediction[part], truth[part], size)
                for part in (slice(half), slice(half, None))
                if len(truth[part])
            ]
            with suppress(ValueError):  # as of few rows of one class
                _value(name, metric, whole)
        except UsageError:
            raise
        except Exception as error:  # a user's metric can fail in any way
            problem = f"fails on the first rows: {describe(error)}"
            raise UsageError(f"metrics: {_locate_metric(name)} {problem}") from error
        if parts and not torch.allclose(sum(parts, torch.zeros_like(whole)), whole, equal_nan=True):
            raise UsageError(
                f"metrics: {_locate_metric(name)} gives sums that do not add up: {_show(whole)} "
                f"for {len(truth)} items, {' and '.join(map(_show, parts))} for two parts of them; "
                "return sums over the items and their number, and divide in `value`"
            )


def _show(sums: Tensor) -> str:
    values = [f"{value:.6g}" for value in sums[:4].tolist()]
    return f"[{', '.join(values)}{', ...' if len(sums) > 4 else ''}]"


def _locate_metric(name: str) -> str:
    """A metric's name, with file and line."""
    entry = registry.metrics.entries.get(name) or registry.metrics.entries.get(name.split("/")[-1])
    return f"{name} ({entry.place})" if entry else name


def _add_up(
    name: str, metric: Metric, prediction: Tensor, truth: Tensor, size: int | None = None
) -> Tensor:
    """A metric's sums over some items: float64 [size]. Raises UsageError for anything else."""
    with noting(f"in metric {name}"):
        sums = metric.sums(prediction, truth)
    if not isinstance(sums, Tensor) or sums.dim() != 1:
        shape = f"shape {list(sums.shape)}" if isinstance(sums, Tensor) else type(sums).__name__
        advice = "return a vector, as torch.stack([...]) makes of sums"
        raise UsageError(f"metrics: {_locate_metric(name)} gives sums of {shape}: {advice}")
    if size is not None and sums.numel() != size:
        advice = "as many are wanted for any items (bincount needs minlength)"
        problem = f"gives {sums.numel()} sums for {len(truth)} items and {size} for none"
        raise UsageError(f"metrics: {_locate_metric(name)} {problem}: {advice}")
    return sums.double()


def _value(name: str, metric: Metric, sums: Tensor) -> float:
    """A metric's value, NaN where it divides by nothing."""
    with noting(f"in metric {name}"):
        try:
            value: Any = metric.value(sums)
        except ZeroDivisionError:
            return math.nan
    if isinstance(value, Tensor) and value.numel() != 1:
        problem = f"gives a value of shape {list(value.shape)}, where one number is wanted"
        raise UsageError(f"metrics: {_locate_metric(name)} {problem}")
    return float(value)


@torch.no_grad()  # not inference_mode: a model may keep what it computed, as RoPE caches
def evaluate(
    objective: Objective,
    store: Dataset,
    rows: Rows,
    batch_size: int,
    metrics: Named,
    device: torch.device,
    notes: list[str] | None = None,
) -> dict[str, float | None]:
    """`loss`, `loss/<term>` and each metric over all validation rows; None without any item.

    A loss that couples rows is that of each `batch_size` rows, averaged over rows. What the values
    do not show, such as that one class is predicted for all rows, is appended to `notes`.
    """
    asked = metrics
    metrics = metrics | (_tallies(objective.terms) if notes is not None else {})
    sizes = [_num_sums(objective, i, name, metric) for name, (i, metric) in metrics.items()]
    num_terms = len(objective.terms)
    starts = range(0, len(rows), batch_size)
    parts: dict[int, Tensor] = {}
    buffer = Buffer(store.layout, min(batch_size, len(rows)), device.type == "cuda")
    seeds = Seeds(0, device)
    with evaluating(objective):
        for index in worker_range(len(starts), comm.rank(), comm.num_workers()):
            start = starts[index]
            seeds.set(0, index)  # for a model that draws even here
            batch = store.gather(rows[start : start + batch_size], buffer)
            parts[index] = _sums(objective, batch, metrics, sizes, device)
    whole = comm.sum_by_index(parts, len(starts), 2 * num_terms + sum(sizes))
    pieces = np.split(whole.numpy(), np.cumsum([num_terms, num_terms, *sizes])[:-1])
    numerators, denominators, *counted = pieces
    results: dict[str, float | None] = {}
    losses = [
        float(n / d) if d > 0 else None for n, d in zip(numerators, denominators, strict=True)
    ]
    if num_terms > 1:
        results |= {f"loss/{t.label}": v for t, v in zip(objective.terms, losses, strict=True)}
    results["loss"] = None  # a term without any item would make the sum another one
    if None not in losses:
        weighted = [
            t.weight * v for t, v in zip(objective.terms, losses, strict=True) if v is not None
        ]
        results["loss"] = sum(weighted)
    for (name, (index, metric)), part in zip(metrics.items(), counted, strict=True):
        if name in asked:
            results[name] = _value(name, metric, torch.from_numpy(part))
        elif notes is not None and (text := _explain_collapse(objective.terms[index], part)):
            notes.append(text)
    return results


def _tallies(terms: list[Term]) -> Named:
    """For each term of few classes, how many items are predicted to be, and are, of each."""
    return {
        f"tally of {term.label}": (index, TALLY)
        for index, term in enumerate(terms)
        if term.target.task(term) in ("classes", "binary")
        and term.targets[0].num_codes <= MOST_CLASSES
    }


def _tally(prediction: Tensor, truth: Tensor) -> Tensor:
    is_binary = truth.dtype == torch.bool
    num_classes = 2 if is_binary else prediction.shape[1]
    labels = prediction if is_binary else prediction.argmax(1)
    both = [
        torch.bincount(each.long().flatten(), minlength=num_classes) for each in (labels, truth)
    ]
    return torch.cat(both).double()


TALLY = Metric(("classes", "binary"), _tally, lambda sums: 0.0, reads=CONFUSION)


def _explain_collapse(term: Term, counts: NDArray[np.float64]) -> str:
    """That one class is predicted for all items although there are others; or nothing."""
    predicted, actual = counts.reshape(2, -1)
    chosen = int(predicted.argmax())
    if not predicted.any() or predicted[chosen] < predicted.sum() or actual[chosen] == actual.sum():
        return ""
    vocabulary: Sequence[Any] = term.targets[0].vocabulary or range(len(predicted))
    label = vocabulary[chosen] if chosen < len(vocabulary) else chosen
    share = actual[chosen] / actual.sum()
    return f"{term.label} predicts only {label!r}; {share:.1%} of the validation rows are {label!r}"


def _sums(
    objective: Objective, batch: Batch, metrics: Named, sizes: list[int], device: torch.device
) -> Tensor:
    """Numerators, denominators and sums of the metrics of one batch: float64 vector."""
    denominators = objective.denominators(batch)
    batch = to_device(batch, device)
    predictions = objective.predict(batch)
    items = objective.items(predictions, batch)
    parts = [torch.stack([item.double().sum() for item in items]).cpu(), denominators]
    for (name, (number, metric)), size in zip(metrics.items(), sizes, strict=True):
        both = _comparable(objective, number, metric, predictions, batch)
        parts.append(_add_up(name, metric, *both, size).cpu())
    return torch.cat(parts)


def _comparable(
    objective: Objective, number: int, metric: Metric, predictions: dict[str, Tensor], batch: Batch
) -> tuple[Tensor, Tensor]:
    """Served prediction and truth as the metric takes them."""
    term = objective.terms[number]
    served = term.served(objective.head(number), predictions)
    truth = term.truth(batch, predictions[term.outputs[0]])[0]
    assert not isinstance(truth, Ragged)
    task = term.target.task(term)
    assert task is not None, "a metric is chosen for a task"
    return term.target.compared(term, served, truth, metric.reading(task), metric.centered)


def _num_sums(objective: Objective, number: int, name: str, metric: Metric) -> int:
    """How many sums the metric has for this term: a worker without rows must send as many."""
    term = objective.terms[number]
    width = objective.sizes[term.outputs[0]] or 1
    if term.loss.head is not None:
        width = term.targets[0].num_codes
    task = term.target.task(term)
    assert task is not None, "a metric is chosen for a task"
    return _add_up(name, metric, *term.target.nothing(term, width, metric.reading(task))).numel()
