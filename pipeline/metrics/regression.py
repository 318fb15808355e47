"""Metrics of amounts, in the target's own unit; of several columns their mean."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from pipeline.metrics.contract import Metric, Task, mean, ratio, register
from pipeline.registry import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")

VALUES: tuple[Task, ...] = ("values",)


@register("r2")
def r2() -> Metric:
    """Share of the target's variance that is explained: 1 is perfect, 0 is the mean."""

    def sums(prediction: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
        parts = torch.ones_like(truth), truth, truth**2, (prediction - truth) ** 2
        return torch.stack([(weight * part).double().sum(0) for part in parts]).flatten()

    def value(s: Tensor) -> float:
        weight, total, squares, errors = s.reshape(4, -1)
        spread = squares - total**2 / weight
        known = (weight > 0) & (spread > 0)
        return mean(1 - errors / spread) if bool(known.all()) else math.nan

    return Metric(VALUES, sums, value, lower_is_better=False, centered=True)


@register("rmse")
def rmse() -> Metric:
    """Root of the mean squared error, in the target's unit."""

    def value(s: Tensor) -> float:
        errors, weight = s.reshape(2, -1)
        return mean((errors / weight).sqrt())

    return Metric(VALUES, _summed(lambda p, t: (p - t) ** 2), value, lower_is_better=True)


@register("mae")
def mae() -> Metric:
    """Mean absolute error, in the target's unit."""
    return _mean_of(lambda p, t: (p - t).abs(), "median")


@register("mape")
def mape() -> Metric:
    """Mean absolute error as a share of the true amount, which should be far from 0."""
    least = torch.finfo(torch.float64).eps
    return _mean_of(lambda p, t: (p - t).abs() / t.abs().clamp(min=least), "median")


@register("median_absolute_error")
def median_absolute_error() -> Metric:
    """Median of the absolute errors, in the target's unit; needs all rows at once."""

    def value(prediction: Tensor, truth: Tensor, weight: Tensor) -> float:
        errors = (prediction.double() - truth.double()).abs()
        columns = zip(errors.unbind(1), weight.unbind(1), strict=True)
        return mean(torch.stack([_median(*column) for column in columns]))

    return Metric(VALUES, None, value, lower_is_better=True, baseline="median")


@register("pinball_loss")
def pinball_loss() -> Metric:
    """Mean pinball loss of predicted quantiles over their levels, in the target's unit."""

    def sums(prediction: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
        excess, level = truth.double() - prediction[:, :, 0].double(), prediction[:, :, 1].double()
        losses = torch.maximum(level * excess, (level - 1) * excess)
        return torch.stack([(weight * losses).sum(), weight.sum()])

    return Metric(
        VALUES, sums, lambda s: ratio(s[0], s[1]), lower_is_better=True, reads="quantiles"
    )


@register("coverage")
def coverage() -> Metric:
    """Share of amounts from the lowest to the highest quantile, to compare with their levels."""

    def sums(prediction: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
        amounts, truth, weight = prediction[:, :, 0], truth[:, :1], weight[:, 0]
        is_in = (amounts[:, :1] <= truth) & (truth <= amounts[:, -1:])
        return torch.stack([(weight * is_in[:, 0]).sum(), weight.sum()])

    return Metric(VALUES, sums, lambda s: ratio(s[0], s[1]), reads="quantiles", baseline=None)


@register("poisson_deviance")
def poisson_deviance() -> Metric:
    """Mean deviance of counts from predicted rates: 0 is perfect (mean_poisson_deviance)."""

    def deviance(prediction: Tensor, truth: Tensor) -> Tensor:
        logarithm = torch.where(truth > 0, (truth / prediction).log(), 0.0)
        return 2 * (truth * logarithm - truth + prediction)

    return _of_rates(deviance)


@register("gamma_deviance")
def gamma_deviance() -> Metric:
    """Mean deviance of amounts above 0 from predicted means: 0 is perfect (mean_gamma_deviance)."""

    def deviance(prediction: Tensor, truth: Tensor) -> Tensor:
        return 2 * ((prediction / truth).log() + truth / prediction - 1)

    return _of_rates(deviance)


@register("tweedie_deviance")
def tweedie_deviance() -> Metric:
    """Mean Tweedie deviance, of power 1.5, of amounts of which many are 0: 0 is perfect."""

    def deviance(prediction: Tensor, truth: Tensor) -> Tensor:
        # 2 (y^(2-p) / ((1-p)(2-p)) - y m^(1-p) / (1-p) + m^(2-p) / (2-p)) for a power p of 1.5
        return 4 * (truth / prediction.sqrt() - 2 * truth.sqrt() + prediction.sqrt())

    return _of_rates(deviance)


def _mean_of(
    error: Callable[[Tensor, Tensor], Tensor], baseline: Literal["mean", "median"] = "mean"
) -> Metric:
    """The mean over items of an error that is better when lower."""

    def value(s: Tensor) -> float:
        errors, weight = s.reshape(2, -1)
        return mean(errors / weight)

    return Metric(VALUES, _summed(error), value, lower_is_better=True, baseline=baseline)


def _of_rates(deviance: Callable[[Tensor, Tensor], Tensor]) -> Metric:
    """The mean of a deviance from predicted rates."""
    metric = _mean_of(deviance)
    return Metric(VALUES, metric.sums, metric.value, lower_is_better=True, reads="rates")


def _summed(
    error: Callable[[Tensor, Tensor], Tensor],
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Sums of each column's errors and weights: float64 [2 columns]."""

    def sums(prediction: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
        errors = weight * error(prediction.double(), truth.double())
        return torch.stack([errors.sum(0), weight.sum(0)]).flatten()

    return sums


def _median(values: Tensor, weight: Tensor) -> Tensor:
    """The weighted median: between the two middle values where the weight is cut in half."""
    counted = weight > 0
    values, order = values[counted].sort()
    if not len(values):
        return values.new_tensor(math.nan)
    total = weight[counted][order].cumsum(0)
    half = total[-1] / 2
    last = len(values) - 1
    low = torch.searchsorted(total, half).clamp(max=last)
    high = torch.searchsorted(total, half, right=True).clamp(max=last)
    return (values[low] + values[high]) / 2
