"""The weights of the best evaluation so far, which become the model: part of every checkpoint."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from pipeline.errors import UsageError
from pipeline.losses.terms import Term
from pipeline.registry import nearest
from pipeline.rundir import records
from pipeline.rundir.journal import finite
from pipeline.train.evaluate import Named
from pipeline.train.weights import to_cpu


class Best:
    """Keeps the weights that gave the best value of one metric, the first of equal ones."""

    def __init__(self, name: str, terms: list[Term], metrics: Named) -> None:
        """Raises UsageError for a name that no evaluation has."""
        losses = {"loss", *(f"loss/{term.label}" for term in terms if len(terms) > 1)}
        if name not in losses | set(metrics):
            known = sorted(losses | set(metrics))
            raise UsageError(
                f"training.best_by: no metric {name!r} of the validation rows"
                f"{nearest(name, known)} (known: {', '.join(known)})"
            )
        if name not in losses and metrics[name][1].lower_is_better is None:
            raise UsageError(
                f"training.best_by: metric {name!r} does not say which way is better: "
                "Metric(..., lower_is_better=True), or False"
            )
        self.name = name
        self.lower_is_better = name in losses or bool(metrics[name][1].lower_is_better)
        self.kept: dict[str, Any] | None = None
        """`step`, `value`, all `metrics`, and `weights` on the CPU; None before the first value."""

    def look(self, step: int, values: dict[str, float | None], objective: nn.Module) -> None:
        """Keep the weights if this evaluation, after `step` steps, is better than all before."""
        value = values[self.name]
        if not step or value is None or not math.isfinite(value):
            return
        sign = -1.0 if self.lower_is_better else 1.0
        if self.kept is None or sign * value > sign * self.kept["value"]:
            weights = to_cpu(objective.state_dict())
            metrics = finite(values)
            self.kept = {"step": step, "value": value, "metrics": metrics, "weights": weights}

    @property
    def result(self) -> records.Best | None:
        """Metric, step and value of what is kept, and all metrics of that evaluation."""
        if self.kept is None:
            return None
        facts = {key: self.kept[key] for key in ("step", "value", "metrics")}
        return records.Best(metric=self.name, **facts)
