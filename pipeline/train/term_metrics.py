"""Metrics of a job's loss terms: which it has, and what each is of a term's items."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pipeline import registry
from pipeline.data.batch import Batch, Ragged
from pipeline.errors import UsageError
from pipeline.losses.objective import Objective
from pipeline.losses.targets import Items
from pipeline.losses.terms import Term
from pipeline.metrics import Metric, Reads, Task
from pipeline.rundir.records import Numbers
from pipeline.tracebacks import noting

NO_TASK = '\n  give a custom loss a task: register it with like="mse" or another'


class Reading(NamedTuple):
    """Which items a metric takes: metrics of one reading take the same."""

    term: int
    """The term's place among the job's losses."""
    task: Task
    reads: Reads
    centered: bool

    def items(
        self, objective: Objective, predictions: dict[str, Tensor], batch: Batch, row: Tensor
    ) -> Items:
        """The items of a batch, of which `row` says which rows it has."""
        term = objective.with_threshold(self.term)
        served = objective.served(self.term, predictions)
        truth = term.truth(batch, predictions[term.outputs[0]])[0]
        assert not isinstance(truth, Ragged)
        weight = objective.metric_weight(batch).to(served.device)
        rows = Items(served, truth, weight, row.to(served.device))
        return term.target.compared(term, rows, self.reads, self.centered)

    def no_items(self, objective: Objective) -> Items:
        """The items of no rows, in the same shape."""
        term = objective.terms[self.term]
        width = objective.sizes[term.outputs[0]] or 1
        if term.loss.head is not None:
            width = term.targets[0].num_codes
        prediction, truth = term.target.nothing(term, width, self.reads)
        nothing = torch.zeros(truth.shape)
        return Items(prediction, truth, nothing.double(), nothing.long())


@dataclass(frozen=True, eq=False)
class TermMetric:
    """A metric of one loss term's predictions."""

    name: str
    """Its name in the record, with the term's label where several terms have this metric."""
    metric: Metric
    reading: Reading

    @property
    def place(self) -> str:
        """Its name, with the file and line where it is registered."""
        entries = registry.metrics.entries
        entry = entries.get(self.name) or entries.get(self.name.split("/")[-1])
        return f"{self.name} ({entry.place})" if entry else self.name

    @property
    def needs_all(self) -> bool:
        """Whether it takes all rows at once."""
        return self.metric.sums is None

    @cached_property
    def takes_weight(self) -> bool:
        """Whether its sums are weighted."""
        assert self.metric.sums is not None
        parameters = inspect.signature(self.metric.sums).parameters.values()
        return len(parameters) > 2 or any(p.kind is p.VAR_POSITIONAL for p in parameters)

    def size(self, objective: Objective) -> int:
        """How many sums it has, of any items."""
        if self not in _sizes:
            _sizes[self] = self.sums(self.reading.no_items(objective)).numel()
        return _sizes[self]

    def seen(self, items: Items) -> Items:
        """The items as it sees them."""
        return items

    def sums(self, items: Items, size: int | None = None) -> Tensor:
        """Its sums over these items: float64 [size]. Raises UsageError for anything else."""
        assert self.metric.sums is not None
        arguments = self.seen(items)[: 3 if self.takes_weight else 2]
        with noting(f"in metric {self.name}"):
            sums: Any = self.metric.sums(*arguments)
        if not isinstance(sums, Tensor) or sums.dim() != 1:
            shape = f"shape {list(sums.shape)}" if isinstance(sums, Tensor) else type(sums).__name__
            advice = "return a vector, as torch.stack([...]) makes of sums"
            raise UsageError(f"metrics: {self.place} gives sums of {shape}: {advice}")
        if size is not None and sums.numel() != size:
            advice = "as many are wanted for any items (bincount needs minlength)"
            problem = f"gives {sums.numel()} sums for {len(items.truth)} items and {size} for none"
            raise UsageError(f"metrics: {self.place} {problem}: {advice}")
        return sums.double()

    def value(self, sums: Tensor) -> float:
        """Its value from its sums over all items, NaN where it divides by nothing."""
        return self._call(sums)

    def value_of_all(self, items: Items) -> float:
        """The value of a metric that needs all items; NaN of none."""
        return self._call(*self.seen(items)[:3]) if len(items.truth) else math.nan

    def _call(self, *arguments: Tensor) -> float:
        with noting(f"in metric {self.name}"):
            try:
                value: Any = self.metric.value(*arguments)
            except ZeroDivisionError:
                return math.nan
        if isinstance(value, Tensor) and value.numel() != 1:
            problem = f"gives a value of shape {list(value.shape)}, where one number is wanted"
            raise UsageError(f"metrics: {self.place} {problem}")
        return float(value)


_sizes: WeakKeyDictionary[TermMetric, int] = WeakKeyDictionary()
"""How many sums each metric has, once it is known: every evaluation asks."""


def choose_metrics(
    terms: list[Term], names: list[str] | None, is_weighted: bool = False
) -> list[TermMetric]:
    """The metrics of each term: those named, or what its task usually wants.

    Raises UsageError for a metric that fits none of the terms, or that takes no weights where
    `is_weighted`.
    """
    tasks = [term.target.task(term) for term in terms]
    usual = [
        name
        for term, task in zip(terms, tasks, strict=True)
        for name in (term.target.usual_metrics(term) if task is not None else ())
    ]
    chosen: list[TermMetric] = []
    for name in dict.fromkeys(usual if names is None else names):
        metric = _build_metric(name)
        readings = [_reading(index, term, metric) for index, term in enumerate(terms)]
        fitting = [
            reading
            for reading, term in zip(readings, terms, strict=True)
            if reading and (names is not None or name in term.target.usual_metrics(term))
        ]
        if not fitting:
            raise UsageError(_explain_unfit(name, metric, terms, tasks))
        for reading in fitting:
            label = name if len(fitting) == 1 else f"{terms[reading.term].label}/{name}"
            one = TermMetric(label, metric, reading)
            if is_weighted and not one.needs_all and not one.takes_weight:
                raise UsageError(
                    f"metrics: {one.place} takes no weights, which data.sample_weight.in_metrics "
                    "asks for: let `sums` take (prediction, truth, weight)"
                )
            chosen.append(one)
    return chosen


def _reading(index: int, term: Term, metric: Metric) -> Reading | None:
    """What the metric reads of a term; None if that has no such predictions."""
    task = term.target.task(term)
    if task not in metric.tasks:
        return None
    assert task is not None
    reads = metric.reading(task)
    if reads not in term.target.readable(term):
        return None
    return Reading(index, task, reads, metric.centered)


def _explain_unfit(
    name: str, metric: Metric, terms: Sequence[Term], tasks: Sequence[Task | None]
) -> str:
    """Why a metric is of none of the terms."""
    if any(task in metric.tasks for task in tasks):
        reads = {metric.reading(task) for task in tasks if task in metric.tasks}
        labels = ", ".join(f"{t.label} gives {' and '.join(t.target.readable(t))}" for t in terms)
        return f"metrics: {name} reads {' or '.join(map(str, reads))}; {labels}"
    kinds = ", ".join(f"{t.label} ({k or 'no task'})" for t, k in zip(terms, tasks, strict=True))
    hint = NO_TASK if None in tasks else ""
    return f"metrics: {name} is for {' and '.join(metric.tasks)}, the losses are {kinds}{hint}"


def choose_primary(metrics: Sequence[TermMetric], best_by: str | None) -> tuple[str, bool]:
    """The value of an evaluation that tells most, and whether it is better when lower.

    What `best_by` names, or the first metric that says which way is better, or the loss.
    """
    ways = {
        one.name: one.metric.lower_is_better
        for one in metrics
        if one.metric.lower_is_better is not None
    }
    name = best_by or next(iter(ways), "loss")
    return name, ways.get(name, True)


def not_better(metrics: Sequence[TermMetric], values: Numbers, baselines: Numbers) -> list[str]:
    """A line for each metric that is no better than a constant prediction's."""
    lines = []
    for one in metrics:
        value, constant = values.get(one.name), baselines.get(one.name)
        if value is None or constant is None or one.metric.lower_is_better is None:
            continue
        sign = 1.0 if one.metric.lower_is_better else -1.0
        if sign * value >= sign * constant:
            text = f"{one.name} {value:.6g} is no better than the {constant:.6g} of a constant"
            lines.append(text)
    return lines


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
    if odd := [task for task in metric.tasks if task not in get_args(Task)]:
        known = ", ".join(get_args(Task))
        raise UsageError(
            f"metrics: {name} ({entry.place}) is for {odd[0]!r}; tasks are {known}, "
            'given as a tuple: Metric(("values",), ...)'
        )
    silent = [task for task in metric.tasks if metric.reading(task) is None]
    if silent:
        raise UsageError(
            f"metrics: {name} ({entry.place}) does not say what it reads for {silent[0]}: "
            'Metric(..., reads="labels"), reads="scores" or reads="probabilities"'
        )
    return metric
