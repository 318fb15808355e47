"""The weights of the best evaluation so far, which become the model: part of every checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypedDict

from torch import Tensor, nn

from pipeline import registry
from pipeline.errors import UsageError
from pipeline.losses.terms import Term
from pipeline.registry import nearest
from pipeline.rundir import records
from pipeline.rundir.journal import nonfinite_to_none
from pipeline.rundir.records import Numbers
from pipeline.train.term_metrics import TermMetric
from pipeline.train.weights import to_cpu


class BestState(TypedDict):
    """An evaluation, and the weights that were evaluated, on the CPU."""

    step: int
    value: float
    metrics: Numbers
    weights: dict[str, Tensor]


def is_lower_better(
    key: str, metric: str, terms: list[Term], metrics: Sequence[TermMetric]
) -> bool:
    """Whether lower is better of a metric that the spec names at `key`.

    Raises UsageError for one that no evaluation has, or without a direction.
    """
    losses = {"loss", *(f"loss/{term.label}" for term in terms if len(terms) > 1)}
    ways: dict[str, bool | None] = dict.fromkeys(losses, True)
    ways |= {one.name: one.metric.lower_is_better for one in metrics}
    if metric not in ways:
        known = sorted(ways)
        is_known = metric in registry.metrics.entries
        advice = "; add it to `metrics`" if is_known else nearest(metric, known)
        raise UsageError(
            f"{key}: no metric {metric!r} of the validation rows"
            f"{advice} (known: {', '.join(known)})"
        )
    way = ways[metric]
    if way is None:
        raise UsageError(
            f"{key}: metric {metric!r} does not say which way is better: "
            "Metric(..., lower_is_better=True), or False"
        )
    return way


class BestWeights:
    """Keeps the weights that gave the best value of one metric, the first of equal ones."""

    def __init__(self, metric: str, terms: list[Term], metrics: Sequence[TermMetric]) -> None:
        """Raises UsageError for a metric that no evaluation has, or without a direction."""
        self.metric = metric
        self.lower_is_better = is_lower_better("training.best_by", metric, terms, metrics)
        self.state: BestState | None = None
        """None before the first value."""

    def update(self, step: int, values: Numbers, objective: nn.Module) -> bool:
        """Keep the weights if this evaluation, after `step` steps, is better than all before."""
        value = values[self.metric]
        if not step or value is None or not math.isfinite(value):  # step 0 was not trained
            return False
        sign = -1.0 if self.lower_is_better else 1.0
        is_better = self.state is None or sign * value > sign * self.state["value"]
        if is_better:
            weights = to_cpu(objective.state_dict())
            metrics = nonfinite_to_none(values)
            self.state = {"step": step, "value": value, "metrics": metrics, "weights": weights}
        return is_better

    @property
    def result(self) -> records.Best | None:
        """Metric, step and value of what is kept, and all metrics of that evaluation."""
        if self.state is None:
            return None
        return records.Best(
            metric=self.metric,
            step=self.state["step"],
            value=self.state["value"],
            metrics=self.state["metrics"],
        )
