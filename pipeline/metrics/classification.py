"""Metrics of classes, and of yes and no, that are sums over rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from pipeline.metrics.contract import Metric, Reads, Task, mean, ratio, register
from pipeline.registry import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")

BOTH: tuple[Task, ...] = ("classes", "binary")
CONFUSION: Mapping[Task, Reads] = {"classes": "scores", "binary": "labels"}
"""What a metric reads that counts class by class: scores tell how many there are."""
NUM_BINS = 15
"""Of `calibration_error`, of one width."""
TOP = 5


@register("accuracy")
def accuracy() -> Metric:
    """Share of items whose predicted class is the true one."""

    def sums(prediction: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
        return torch.stack([(weight * (prediction == truth)).sum(), weight.sum()])

    return Metric(BOTH, sums, lambda s: ratio(s[0], s[1]), lower_is_better=False, reads="labels")


@register("balanced_accuracy")
def balanced_accuracy() -> Metric:
    """Mean over the classes of the share of their items that are predicted so."""

    def sums(prediction: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
        counts = count_classes(prediction, truth, weight)
        if truth.dtype != torch.bool:
            return counts
        noes = count_classes(~prediction, ~truth, weight)
        return torch.stack([noes, counts], dim=1).flatten()

    def value(counts: Tensor) -> float:
        right, _, actual = counts.reshape(3, -1)
        return mean((right / actual)[actual > 0])

    return Metric(BOTH, sums, value, lower_is_better=False, reads=CONFUSION)


@register("f1")
def f1() -> Metric:
    """Harmonic mean of precision and recall; for many classes, its mean over the classes."""
    return _by_class(lambda right, predicted, actual: 2 * right / (predicted + actual))


@register("precision")
def precision() -> Metric:
    """Share of predicted positives that are positive; for many classes, the mean over them."""
    return _by_class(lambda right, predicted, actual: right / predicted)


@register("recall")
def recall() -> Metric:
    """Share of positives that are predicted so; for many classes, the mean over them."""
    return _by_class(lambda right, predicted, actual: right / actual)


@register("top_5_accuracy")
def top_5_accuracy() -> Metric:
    """Share of items whose true class is among the five most likely ones."""

    def sums(prediction: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
        own = prediction.gather(1, truth[:, None])
        later = torch.arange(prediction.shape[1], device=truth.device) > truth[:, None]
        num_before = ((prediction > own) | ((prediction == own) & later)).sum(1)
        return torch.stack([(weight * (num_before < TOP)).sum(), weight.sum()])

    return Metric(
        ("classes",), sums, lambda s: ratio(s[0], s[1]), lower_is_better=False, reads="scores"
    )


@register("log_loss")
def log_loss() -> Metric:
    """Mean of -log of the probability of what is true: cross-entropy, without class weights."""
    return Metric(
        BOTH, _log_loss, lambda s: ratio(s[0], s[1]), lower_is_better=True, reads="probabilities"
    )


@register("perplexity")
def perplexity() -> Metric:
    """exp of the `log_loss`: among how many equally likely classes the choice is left."""

    def value(sums: Tensor) -> float:
        return float((sums[0] / sums[1]).exp()) if sums[1] > 0 else math.nan

    return Metric(("classes",), _log_loss, value, lower_is_better=True, reads="probabilities")


@register("brier")
def brier() -> Metric:
    """Mean squared error of the probabilities; for three classes or more, summed over them."""

    def sums(prediction: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
        prediction = prediction.double()
        if truth.dtype == torch.bool:
            errors = (prediction - truth.double()) ** 2
        else:
            num_classes = prediction.shape[1]
            chosen = torch.nn.functional.one_hot(truth, num_classes)
            errors = ((prediction - chosen) ** 2).sum(1) / (2 if num_classes == 2 else 1)
        return torch.stack([(weight * errors).sum(), weight.sum()])

    return Metric(
        BOTH, sums, lambda s: ratio(s[0], s[1]), lower_is_better=True, reads="probabilities"
    )


@register("calibration_error")
def calibration_error() -> Metric:
    """How far probabilities are from the share that comes true, in 15 bins (ECE).

    0 is perfectly calibrated. Of yes for two classes; of the most likely class for more.
    """

    def sums(prediction: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
        prediction = prediction.double()
        came_true = truth
        if truth.dtype != torch.bool:
            prediction, chosen = prediction.max(1)
            came_true = chosen == truth
        bins = (prediction * NUM_BINS).long().clamp(0, NUM_BINS - 1)
        parts = weight, weight * prediction, weight * came_true
        return torch.cat([_count(bins, part, NUM_BINS) for part in parts])

    def value(sums: Tensor) -> float:
        count, confidence, came_true = sums.reshape(3, -1)
        return ratio((confidence - came_true).abs().sum(), count.sum())

    # that of a constant is 0, which makes it no better a prediction
    return Metric(BOTH, sums, value, lower_is_better=True, reads="probabilities", baseline=None)


def count_classes(prediction: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
    """Weight of the right, predicted and actual items of each class (of True only, for two).

    `prediction` are scores [N, C] beside class numbers, or booleans beside booleans; float64 [3 C].
    """
    if truth.dtype == torch.bool:
        parts = prediction & truth, prediction, truth
        return torch.stack([(weight * part).sum() for part in parts])
    chosen = prediction.argmax(1)
    is_right = chosen == truth
    pairs = (truth[is_right], weight[is_right]), (chosen, weight), (truth, weight)
    return torch.cat([_count(codes, part, prediction.shape[1]) for codes, part in pairs])


def _by_class(score: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Metric:
    """The mean of a score over the classes that are predicted or actual; 0 where it is 0 / 0."""

    def value(counts: Tensor) -> float:
        right, predicted, actual = counts.reshape(3, -1)
        return mean(score(right, predicted, actual)[predicted + actual > 0].nan_to_num())

    return Metric(BOTH, count_classes, value, lower_is_better=False, reads=CONFUSION)


def _log_loss(prediction: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
    least = torch.finfo(prediction.dtype).eps  # what its type cannot tell from certain
    if truth.dtype == torch.bool:
        right = torch.where(truth, prediction.double(), 1 - prediction.double())
    else:
        right = prediction.gather(1, truth[:, None])[:, 0].double()
    losses = -right.clamp(least, 1 - least).log()
    return torch.stack([(weight * losses).sum(), weight.sum()])


def _count(codes: Tensor, weight: Tensor, num_codes: int) -> Tensor:
    """The weight of each code: on the CPU, as a GPU adds weights up in any order."""
    return torch.bincount(codes.flatten().cpu(), weight.flatten().cpu(), num_codes)
