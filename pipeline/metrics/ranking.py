"""Metrics of how scores rank items: each needs all of them at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from pipeline.metrics.contract import Metric, mean, register
from pipeline.registry import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")

Area = Callable[["Tensor", "Tensor"], "Tensor"]
"""From the weight of the noes and of the yeses that score at least each threshold: falling ones."""


@register("roc_auc")
def roc_auc() -> Metric:
    """Chance that a yes scores higher than a no; of many classes, each against the rest, the mean.

    0.5 is no better than by chance.
    """

    def area(noes: Tensor, yeses: Tensor) -> Tensor:
        return torch.trapezoid(yeses / yeses[-1], noes / noes[-1])

    return _ranked(area)


@register("average_precision")
def average_precision() -> Metric:
    """Area under precision over recall; the share of yes is what chance gives.

    Of many classes, each against the rest, the mean.
    """

    def area(noes: Tensor, yeses: Tensor) -> Tensor:
        precision = (yeses[1:] / (yeses[1:] + noes[1:])).nan_to_num()  # rows may weigh nothing
        return (precision * yeses.diff()).sum() / yeses[-1]

    return _ranked(area)


def _ranked(area: Area) -> Metric:
    def value(prediction: Tensor, truth: Tensor, weight: Tensor) -> float:
        if bool(prediction.isnan().any()):  # which has no place in the order
            return math.nan
        if truth.dtype != torch.bool:
            classes = torch.arange(prediction.shape[1], device=truth.device)
            truth = truth[:, None] == classes
            weight = weight[:, None].expand_as(truth)
        flat = [part.reshape(len(part), -1).unbind(1) for part in (prediction, truth, weight)]
        areas = []
        for column in zip(*flat, strict=True):
            noes, yeses = _cumulate(*column)
            if noes[-1] > 0 and yeses[-1] > 0:  # else there is nothing to tell apart
                areas.append(area(noes, yeses))
        return mean(torch.stack(areas)) if areas else math.nan

    return Metric(("classes", "binary"), None, value, lower_is_better=False, reads="scores")


def _cumulate(score: Tensor, truth: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weight of the noes, and of the yeses, that score at least each distinct score, from none."""
    score, order = score.sort(descending=True)
    is_last = torch.ones_like(score, dtype=torch.bool)
    is_last[:-1] = score[1:] != score[:-1]  # items of one score are told apart by none
    start = weight.new_zeros(1)

    def cumulated(counted: Tensor) -> Tensor:
        return torch.cat([start, (weight * counted)[order].cumsum(0)[is_last]])

    return cumulated(~truth), cumulated(truth)
