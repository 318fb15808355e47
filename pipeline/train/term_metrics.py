"""Metrics of a job's loss terms: which it has, and each one's sums over a term's items."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline import registry
from pipeline.data.batch import Batch, Ragged
from pipeline.data.dataset import Dataset
from pipeline.data.streaming import Streamed
from pipeline.errors import UsageError
from pipeline.losses.objective import Objective
from pipeline.losses.terms import Term
from pipeline.metrics import DEFAULTS, Metric, Task
from pipeline.rundir.records import Numbers
from pipeline.tracebacks import noting

MEDIAN_ROWS = 10**6
"""Training rows, evenly spaced, whose median is taken for that of all."""
NO_TASK = '\n  give a custom loss a task: register it with like="mse" or another'


@dataclass(frozen=True)
class TermMetric:
    """A metric of one loss term's predictions."""

    name: str
    """Its name in the record, with the term's label where several terms have this metric."""
    metric: Metric
    index: int
    """The term's place among the job's losses."""

    @property
    def place(self) -> str:
        """Its name, with the file and line where it is registered."""
        entries = registry.metrics.entries
        entry = entries.get(self.name) or entries.get(self.name.split("/")[-1])
        return f"{self.name} ({entry.place})" if entry else self.name

    def comparable(
        self, objective: Objective, predictions: dict[str, Tensor], batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """Served prediction and truth of the items, as the metric takes them."""
        term = objective.terms[self.index]
        served = term.served(objective.head(self.index), predictions)
        truth = term.truth(batch, predictions[term.outputs[0]])[0]
        assert not isinstance(truth, Ragged)
        task = _task(term)
        return term.target.compared(
            term, served, truth, self.metric.reading(task), self.metric.centered
        )

    def num_sums(self, objective: Objective) -> int:
        """How many sums there are: a worker without rows must send as many."""
        term = objective.terms[self.index]
        width = objective.sizes[term.outputs[0]] or 1
        if term.loss.head is not None:
            width = term.targets[0].num_codes
        nothing = term.target.nothing(term, width, self.metric.reading(_task(term)))
        return self.sums(*nothing).numel()

    def sums(self, prediction: Tensor, truth: Tensor, size: int | None = None) -> Tensor:
        """Its sums over these items: float64 [size]. Raises UsageError for anything else."""
        with noting(f"in metric {self.name}"):
            sums = self.metric.sums(prediction, truth)
        if not isinstance(sums, Tensor) or sums.dim() != 1:
            shape = f"shape {list(sums.shape)}" if isinstance(sums, Tensor) else type(sums).__name__
            advice = "return a vector, as torch.stack([...]) makes of sums"
            raise UsageError(f"metrics: {self.place} gives sums of {shape}: {advice}")
        if size is not None and sums.numel() != size:
            advice = "as many are wanted for any items (bincount needs minlength)"
            problem = f"gives {sums.numel()} sums for {len(truth)} items and {size} for none"
            raise UsageError(f"metrics: {self.place} {problem}: {advice}")
        return sums.double()

    def value(self, sums: Tensor) -> float:
        """Its value, NaN where it divides by nothing."""
        with noting(f"in metric {self.name}"):
            try:
                value: Any = self.metric.value(sums)
            except ZeroDivisionError:
                return math.nan
        if isinstance(value, Tensor) and value.numel() != 1:
            problem = f"gives a value of shape {list(value.shape)}, where one number is wanted"
            raise UsageError(f"metrics: {self.place} {problem}")
        return float(value)


@dataclass(frozen=True)
class Baseline(TermMetric):
    """The metric of a constant prediction: what a model has to beat."""

    constant: Tensor
    """One item, as the metric takes it."""

    def comparable(
        self, objective: Objective, predictions: dict[str, Tensor], batch: Batch
    ) -> tuple[Tensor, Tensor]:
        prediction, truth = super().comparable(objective, predictions, batch)
        return self.constant.to(prediction).expand_as(prediction), truth


def choose_baselines(
    terms: list[Term], metrics: Sequence[TermMetric], train: Dataset
) -> list[Baseline]:
    """Each metric of what is best without inputs, where the training targets tell what that is."""
    baselines = []
    for one in metrics:
        term = terms[one.index]
        reads = one.metric.reading(_task(term))
        constant = term.target.constant(term, reads, one.metric.centered)
        if constant is not None and one.metric.baseline == "median":
            constant = _median(term, train, constant)
        if constant is not None:
            baselines.append(Baseline(one.name, one.metric, one.index, constant))
    return baselines


def _median(term: Term, train: Dataset, mean: Tensor) -> Tensor:
    """The training targets' median, of a million rows at most; the mean of rows not at hand."""
    if isinstance(train, Streamed):
        return mean
    rows = np.unique(np.linspace(0, len(train) - 1, min(len(train), MEDIAN_ROWS)).astype(np.int64))
    truth = term.truth(train.columns([field.name for field in term.targets], rows))[0]
    assert isinstance(truth, Tensor)
    amounts, _ = term.target.compared(term, truth, truth, None, False)
    return torch.from_numpy(np.median(amounts.numpy(), axis=0))


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


def choose_metrics(terms: list[Term], names: list[str] | None) -> list[TermMetric]:
    """The metrics of each term: those named, or what its task usually wants.

    Raises UsageError for a metric that fits none of the terms.
    """
    chosen: list[TermMetric] = []
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
            label = name if len(fitting) == 1 else f"{terms[i].label}/{name}"
            chosen.append(TermMetric(label, metric, i))
    return chosen


def _task(term: Term) -> Task:
    task = term.target.task(term)
    assert task is not None, "a metric is chosen for a task"
    return task


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
