"""Metrics of validation rows, exact over any number of workers.

A metric is a vector of sums that add up over rows, and a number made of them at the end. No mean
of means, and no rows gathered in one place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pipeline import registry
from pipeline.registry import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")

Task = Literal["classes", "binary", "values"]
Reads = Literal["labels", "probabilities"]
register = registry.metrics.register


@dataclass(frozen=True)
class Metric:
    """Sums over rows (float64 vector) of served prediction and truth, and their value.

    What a metric of classes, or of yes and no, is given is what it `reads`; ignored items are left
    out before. For `classes` these are `probabilities` [N, C] or `labels` [N], beside class numbers
    [N]; for `binary` `probabilities` [N] of yes or `labels` [N] (booleans), beside booleans [N].
    Where a loss has no probabilities they are its scores. For `values`: numbers [N, columns] in the
    target's own unit; the built-in ones are the mean over the columns, as in scikit-learn.
    """

    tasks: tuple[Task, ...]
    sums: Callable[[Tensor, Tensor], Tensor]
    value: Callable[[Tensor], float]
    lower_is_better: bool | None = None
    """Which way is better; `training.best_by` asks for it."""
    reads: Reads | Mapping[Task, Reads] | None = None
    """What it takes, for all its tasks or by task; only a metric of `values` may leave it out."""
    centered: bool = False
    """Amounts reach `sums` less their training mean, where large squares would cancel."""
    baseline: Literal["mean", "median"] = "mean"
    """The constant that amounts are best predicted by: of the training targets."""

    def reading(self, task: Task) -> Reads | None:
        """What it takes for a task; None where it does not say."""
        return self.reads.get(task) if isinstance(self.reads, Mapping) else self.reads


CONFUSION: Mapping[Task, Reads] = {"classes": "probabilities", "binary": "labels"}
"""What a metric reads that counts class by class: probabilities tell how many there are."""
DEFAULTS: dict[Task, tuple[str, ...]] = {
    "classes": ("accuracy",),
    "binary": ("accuracy", "f1"),
    "values": ("r2", "rmse"),
}


@register("accuracy")
def accuracy() -> Metric:
    """Share of items whose predicted class is the true one."""

    def sums(prediction: Tensor, truth: Tensor) -> Tensor:
        right = (prediction == truth).sum()
        return torch.stack([right, torch.tensor(truth.numel(), device=right.device)]).double()

    return Metric(
        ("classes", "binary"),
        sums,
        lambda s: _ratio(s[0], s[1]),
        lower_is_better=False,
        reads="labels",
    )


@register("f1")
def f1() -> Metric:
    """Harmonic mean of precision and recall; for many classes, its mean over the classes."""

    def value(counts: Tensor) -> float:
        right, predicted, actual = counts.reshape(3, -1)
        both = predicted + actual
        scores = torch.where(both > 0, 2 * right / both.clamp(min=1), 0.0)
        return _mean(scores[both > 0])

    return Metric(("classes", "binary"), _confusion, value, lower_is_better=False, reads=CONFUSION)


@register("precision")
def precision() -> Metric:
    """Share of predicted positives that are positive; for many classes, the mean over them."""

    def value(counts: Tensor) -> float:
        right, predicted, actual = counts.reshape(3, -1)
        return _mean((right / predicted.clamp(min=1))[predicted + actual > 0])

    return Metric(("classes", "binary"), _confusion, value, lower_is_better=False, reads=CONFUSION)


@register("recall")
def recall() -> Metric:
    """Share of positives that are predicted so; for many classes, the mean over them."""

    def value(counts: Tensor) -> float:
        right, predicted, actual = counts.reshape(3, -1)
        return _mean((right / actual.clamp(min=1))[predicted + actual > 0])

    return Metric(("classes", "binary"), _confusion, value, lower_is_better=False, reads=CONFUSION)


@register("r2")
def r2() -> Metric:
    """Share of the target's variance that is explained: 1 is perfect, 0 is the mean."""

    def sums(prediction: Tensor, truth: Tensor) -> Tensor:
        errors = (prediction - truth) ** 2
        parts = torch.ones_like(truth), truth, truth**2, errors
        return torch.stack([part.double().sum(0) for part in parts]).flatten()

    def value(s: Tensor) -> float:
        count, total, squares, errors = s.reshape(4, -1)
        spread = squares - total**2 / count
        known = (count > 1) & (spread > 0)
        return _mean(1 - errors / spread) if bool(known.all()) else math.nan

    return Metric(("values",), sums, value, lower_is_better=False, centered=True)


@register("rmse")
def rmse() -> Metric:
    """Root of the mean squared error, in the target's unit."""

    def sums(prediction: Tensor, truth: Tensor) -> Tensor:
        errors = (prediction - truth) ** 2
        return torch.stack([errors.sum(0), torch.ones_like(errors).sum(0)]).double().flatten()

    def value(s: Tensor) -> float:
        errors, count = s.reshape(2, -1)
        return _mean((errors / count).sqrt())

    return Metric(("values",), sums, value, lower_is_better=True)


@register("mae")
def mae() -> Metric:
    """Mean absolute error, in the target's unit."""

    def sums(prediction: Tensor, truth: Tensor) -> Tensor:
        errors = (prediction - truth).abs()
        return torch.stack([errors.sum(0), torch.ones_like(errors).sum(0)]).double().flatten()

    def value(s: Tensor) -> float:
        errors, count = s.reshape(2, -1)
        return _mean(errors / count)

    return Metric(("values",), sums, value, lower_is_better=True, baseline="median")


def _mean(values: Tensor) -> float:
    return float(values.mean()) if values.numel() else math.nan


def _ratio(part: Tensor, whole: Tensor) -> float:
    return float(part / whole) if whole > 0 else math.nan


def _confusion(prediction: Tensor, truth: Tensor) -> Tensor:
    """Right, predicted and actual items of each class (of True only, for two): float64 [3 C]."""
    if truth.dtype == torch.bool:
        chosen = prediction
        return torch.stack([(chosen & truth).sum(), chosen.sum(), truth.sum()]).double()
    chosen = prediction.argmax(1)
    num_classes = prediction.shape[1]
    return torch.cat(
        [
            torch.bincount(part.flatten(), minlength=num_classes).double()
            for part in (truth[chosen == truth], chosen, truth)
        ]
    )
