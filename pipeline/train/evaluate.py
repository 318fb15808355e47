"""Loss and metrics of the validation rows, exact over all workers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from pipeline import registry
from pipeline.data.batch import Batch, Ragged, moved
from pipeline.data.columns import Columns, gather
from pipeline.data.order import Rows
from pipeline.errors import UsageError
from pipeline.losses.objective import Objective
from pipeline.losses.terms import Term
from pipeline.metrics import DEFAULTS, Metric, Task
from pipeline.train import reduce

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
        metric: Metric = registry.metrics[name].build()
        fitting = [i for i, task in enumerate(tasks) if task in metric.tasks]
        if not fitting and names is not None:
            kinds = ", ".join(
                f"{t.label} ({k or 'no task'})" for t, k in zip(terms, tasks, strict=True)
            )
            raise UsageError(
                f"metrics: {name} is for {' and '.join(metric.tasks)}, the losses are {kinds}"
            )
        for i in fitting:
            found[name if len(fitting) == 1 else f"{terms[i].label}/{name}"] = (i, metric)
    return found


def _task(term: Term) -> Task | None:
    if term.loss.target == "classes":
        return "classes"
    if term.loss.target in ("binary", "signs"):
        return "binary" if term.loss.shape == "as_target" else None
    if term.loss.target in ("values", "counts"):
        return "values"
    numbers = all(field.kind == "number" for field in term.targets)
    return "values" if term.loss.target == "any" and term.targets and numbers else None


@torch.inference_mode()
def evaluate(
    objective: Objective,
    columns: Columns,
    rows: Rows,
    batch_size: int,
    metrics: Named,
    device: torch.device,
) -> dict[str, float]:
    """`loss`, `loss/<term>` and each metric over all validation rows."""  # fmt: skip
    was_training = objective.training
    objective.eval()
    num_terms = len(objective.terms)
    numerators = torch.zeros(num_terms, dtype=torch.float64)
    denominators = torch.zeros(num_terms, dtype=torch.float64)
    sums: dict[str, Tensor] = {}
    for batch in _own_batches(columns, rows, batch_size):
        denominators += objective.denominators(batch)
        batch = moved(batch, device)
        predictions = objective.predict(batch)
        for k, items in enumerate(objective.items(predictions, batch)):
            numerators[k] += items.double().sum().cpu()
        for name, (k, metric) in metrics.items():
            served, truth = _comparable(objective, k, predictions, batch)
            part = metric.sums(served, truth).cpu()
            sums[name] = sums[name] + part if name in sums else part
    objective.train(was_training)
    return _values(objective, numerators, denominators, sums, metrics)


def _own_batches(columns: Columns, rows: Rows, batch_size: int) -> Iterator[Batch]:
    """This worker's contiguous part of the validation batches."""
    cuts = range(0, len(rows), batch_size)
    first, last = (len(cuts) * (reduce.rank() + i) // reduce.num_workers() for i in (0, 1))
    for start in cuts[first:last]:
        yield gather(columns, rows[start : start + batch_size])


def _comparable(
    objective: Objective, number: int, predictions: dict[str, Tensor], batch: Batch
) -> tuple[Tensor, Tensor]:
    """Served prediction and truth as metrics take them."""
    term = objective.terms[number]
    served = term.served(objective.head(number), predictions)
    truth = term.truth(batch, predictions[term.outputs[0]])[0]
    assert not isinstance(truth, Ragged)
    if term.loss.target == "classes":
        by_class = served.movedim(1, -1)
        kept = truth != (term.loss.ignore_index if term.loss.ignore_index is not None else -100)
        return by_class[kept], truth[kept]
    if term.loss.target == "binary":
        return served > 0.5, truth > 0.5
    if term.loss.target == "signs":
        return served > 0, truth > 0
    return unscaled(term, served), unscaled(term, truth)


def unscaled(term: Term, values: Tensor) -> Tensor:
    """Values in the unit of the target columns."""
    mean = values.new_tensor([field.mean for field in term.targets], dtype=torch.float64)
    deviation = values.new_tensor([field.deviation for field in term.targets], dtype=torch.float64)
    if len(term.targets) == 1:
        mean, deviation = mean[0], deviation[0]
    return values.double() * deviation + mean


def _values(
    objective: Objective,
    numerators: Tensor,
    denominators: Tensor,
    sums: dict[str, Tensor],
    metrics: Named,
) -> dict[str, float]:
    """The parts of all workers, added up and divided once."""  # fmt: skip
    sizes = [num_sums(objective, *metrics[name]) for name in metrics]
    own = [sums.get(name, torch.zeros(n)).double() for name, n in zip(metrics, sizes, strict=True)]
    everything = reduce.total(torch.cat([numerators, denominators, *own]))
    num_terms = len(objective.terms)
    parts = np.split(everything.numpy(), np.cumsum([num_terms, num_terms, *sizes])[:-1])
    numerators, denominators, *whole = (torch.from_numpy(part) for part in parts)
    found: dict[str, float] = {}
    total = 0.0
    for term, n, d in zip(objective.terms, numerators, denominators, strict=True):
        if d > 0:
            total += term.weight * float(n / d)
            if num_terms > 1:
                found[f"loss/{term.label}"] = float(n / d)
    found["loss"] = total
    return found | {
        name: metric.value(part)
        for (name, (_, metric)), part in zip(metrics.items(), whole, strict=True)
    }


def num_sums(objective: Objective, number: int, metric: Metric) -> int:
    """How many sums the metric has for this term: a worker without rows must send as many."""
    term = objective.terms[number]
    if term.loss.target == "classes":
        width = objective.sizes[term.outputs[0]] or 1
        if term.loss.head is not None:
            width = term.targets[0].num_codes
        like = torch.zeros(0, width), torch.zeros(0, dtype=torch.int64)
    elif term.loss.target in ("binary", "signs"):
        like = torch.zeros(0, dtype=torch.bool), torch.zeros(0, dtype=torch.bool)
    else:
        like = torch.zeros(0), torch.zeros(0)
    return metric.sums(*like).numel()
