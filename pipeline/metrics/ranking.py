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

MAX_PAIRED = 1024
"""Rows of which each is compared with each."""
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


@register("concordance")
def concordance() -> Metric:
    """Chance that what happens earlier had the higher risk, of the pairs that tell (Harrell's C).

    0.5 is no better than by chance; equal risks count half. A pair tells if the earlier one of them
    is known to have happened; at one time what happened is before what was not seen.
    """

    def value(prediction: Tensor, truth: Tensor, weight: Tensor) -> float:
        if bool(prediction.isnan().any()):
            return math.nan
        happened = truth[:, 1] > 0.5
        _, moment = torch.unique(truth[:, 0], return_inverse=True)
        moment = 2 * moment + ~happened
        moment, order = moment.sort(stable=True)
        columns = moment, prediction.double()[order], (weight * happened)[order], weight[order]
        right, equal, pairs = _count_pairs(*columns).tolist()
        return (right + equal / 2) / pairs if pairs > 0 else math.nan

    return Metric(("survival",), None, value, lower_is_better=False, reads="risks")


def _count_pairs(moment: Tensor, risk: Tensor, happened: Tensor, weight: Tensor) -> Tensor:
    """Weight of the pairs whose earlier one has the higher risk, the same, and any.

    Rows in the order of their moments; `happened` is the weight of those that did. Those of the
    first half beside those of the second, and then each half by itself.
    """
    if len(moment) <= MAX_PAIRED:
        pairs = happened[:, None] * weight[None, :] * (moment[:, None] < moment[None, :])
        higher, equal = risk[:, None] > risk[None, :], risk[:, None] == risk[None, :]
        return torch.stack([(pairs * higher).sum(), (pairs * equal).sum(), pairs.sum()])
    middle = int(torch.searchsorted(moment, moment[len(moment) // 2]))
    middle = middle or int(torch.searchsorted(moment, moment[0], right=True))
    if middle == len(moment):  # of one moment no pair tells
        return risk.new_zeros(3)
    halves = [[part[:middle], part[middle:]] for part in (moment, risk, happened, weight)]
    (_, _), (earlier, later), (counted, _), (_, beside) = halves
    later, order = later.sort()
    total = torch.cat([beside.new_zeros(1), beside[order].cumsum(0)])
    below, until = (
        total[torch.searchsorted(later, earlier, right=right)] for right in (False, True)
    )
    across = [(counted * part).sum() for part in (below, until - below, total[-1])]
    first, second = zip(*halves, strict=True)
    return torch.stack(across) + _count_pairs(*first) + _count_pairs(*second)


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
            noes, yeses = cumulated_by_score(*column)
            if noes[-1] > 0 and yeses[-1] > 0:  # else there is nothing to tell apart
                areas.append(area(noes, yeses))
        return mean(torch.stack(areas)) if areas else math.nan

    return Metric(("classes", "binary"), None, value, lower_is_better=False, reads="scores")


def cumulated_by_score(score: Tensor, truth: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weight of the noes, and of the yeses, that score at least each distinct score, from none."""
    score, order = score.sort(descending=True)
    is_last = torch.ones_like(score, dtype=torch.bool)
    is_last[:-1] = score[1:] != score[:-1]  # items of one score are told apart by none
    start = weight.new_zeros(1)

    def cumulated(counted: Tensor) -> Tensor:
        return torch.cat([start, (weight * counted)[order].cumsum(0)[is_last]])

    return cumulated(~truth), cumulated(truth)
