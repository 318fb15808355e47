"""What a metric is: sums that add up over rows, or a function of all rows at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pipeline import registry

if TYPE_CHECKING:
    from torch import Tensor

Task = Literal["classes", "binary", "values", "survival"]
Reads = Literal["labels", "scores", "probabilities", "amounts", "rates", "quantiles", "risks"]
register = registry.metrics.register


@dataclass(frozen=True)
class Metric:
    """A number that tells how good predictions are, exact over any number of workers.

    Most metrics are sums over rows (a float64 vector), and a value made of them at the end: no mean
    of means, and no rows gathered in one place. One that needs all rows at once, as a rank does,
    has no `sums`: its value is a function of all predictions, truths and weights.

    What it is given is what it `reads`; ignored items are left out before. For `classes` that are
    `scores` or `probabilities` [N, C], or `labels` [N], beside class numbers [N]; for `binary`
    `scores` or `probabilities` of yes [N] or [N, K], or `labels` (booleans), beside booleans. For
    `values` it is `amounts` [N, columns] in the target's own unit, or `rates`, which are amounts
    above 0; the built-in metrics are the mean over the columns, as in scikit-learn; or `quantiles`
    [N, levels, 2], each amount with its level, beside amounts [N, levels]. For `survival` it is
    `risks` [N] beside [N, 2], a time and whether it happened then. The weight of each item, where
    `sums` takes a third argument, has the truth's shape; for `survival` [N].
    """

    tasks: tuple[Task, ...]
    sums: Callable[..., Tensor] | None
    """Of (prediction, truth) or (prediction, truth, weight)."""
    value: Callable[..., float]
    """Of the sums, or of (prediction, truth, weight) where there are none."""
    lower_is_better: bool | None = None
    """Which way is better; `training.best_by` asks for it."""
    reads: Reads | Mapping[Task, Reads] | None = None
    """What it takes, for all its tasks or by task; only a metric of `values` may leave it out.

    A loss with scores only has no metric that reads probabilities, and one of amounts none that
    reads rates."""
    centered: bool = False
    """Amounts reach `sums` less their training mean, where large squares would cancel."""
    baseline: Literal["mean", "median"] | None = "mean"
    """The constant that amounts are best predicted by: of the training targets. None for a metric
    that says nothing of a constant."""

    def reading(self, task: Task) -> Reads | None:
        """What it takes for a task; None where it does not say."""
        if isinstance(self.reads, Mapping):
            return self.reads.get(task)
        return self.reads or ("amounts" if task == "values" else None)


def mean(values: Tensor) -> float:
    """Their mean, NaN of none."""
    return float(values.mean()) if values.numel() else math.nan


def ratio(part: Tensor, whole: Tensor) -> float:
    """One number over another, NaN over nothing."""
    return float(part / whole) if whole > 0 else math.nan
