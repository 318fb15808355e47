"""Losses of counts and costs, whose spread grows with their mean: from the mean's logarithm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from pipeline.losses.contract import Loss, Role, elements, register
from pipeline.registry import lazy

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
else:
    torch = lazy("torch")
    F = lazy("torch.nn.functional")

LEAST_DISPERSION = 1e-6
DISPERSION = Role("dispersion", "variances", activation="softplus")
ALWAYS_ZERO = Role("always_zero", "logits")


@register("gamma")
def gamma() -> Loss:
    """Gamma likelihood of costs and durations above 0; predicts the log of the mean.

    Half of the gamma deviance but for what depends on the target alone (McCullagh and Nelder,
    Generalized Linear Models, 1989). Mean over elements.
    """

    def items(prediction: Tensor, target: Tensor) -> Tensor:
        return prediction + target * (-prediction).exp()

    return Loss(items, elements, (Role(kind="log_rates"),), "counts", link=torch.exp)


@register("tweedie")
def tweedie(*, power: Annotated[float, Field(gt=1, lt=2)] = 1.5) -> Loss:
    """Tweedie likelihood of amounts of which many are 0, as claims; predicts the log of the mean.

    Half of the Tweedie deviance but for what depends on the target alone (Jørgensen, The Theory of
    Dispersion Models, 1997); the variance is the mean to the `power`. Mean over elements.
    """

    def items(prediction: Tensor, target: Tensor) -> Tensor:
        of_mean = ((2 - power) * prediction).exp() / (2 - power)
        return of_mean - target * ((1 - power) * prediction).exp() / (1 - power)

    return Loss(items, elements, (Role(kind="log_rates"),), "counts", link=torch.exp)


@register("negative_binomial")
def negative_binomial() -> Loss:
    """Counts that spread more than Poisson's: outputs log of the mean m, and `dispersion` d.

    Their variance is m + d m^2 (Hilbe, Negative Binomial Regression, 2011). Mean over elements.
    """

    def items(prediction: Tensor, dispersion: Tensor, target: Tensor) -> Tensor:
        _refuse_other_shape(prediction, dispersion=dispersion)
        likelihood = _negative_binomial(prediction.double(), dispersion, target.double())
        return -likelihood.to(prediction.dtype)

    def link(prediction: Tensor, dispersion: Tensor) -> Tensor:
        return prediction.exp()

    return Loss(items, elements, (Role(kind="log_rates"), DISPERSION), "counts", link=link)


@register("zero_inflated_poisson")
def zero_inflated_poisson() -> Loss:
    """Poisson counts of which some are always 0: outputs log of the rate, and `always_zero` logits.

    Lambert, Zero-Inflated Poisson Regression, 1992. Mean over elements; serves the mean count.
    """

    def items(prediction: Tensor, always_zero: Tensor, target: Tensor) -> Tensor:
        _refuse_other_shape(prediction, always_zero=always_zero)
        log_rate, count = prediction.double(), target.double()
        poisson = count * log_rate - log_rate.exp() - torch.lgamma(count + 1)
        return _zero_inflated(poisson, always_zero, target).to(prediction.dtype)

    def link(prediction: Tensor, always_zero: Tensor) -> Tensor:
        return (-always_zero).sigmoid() * prediction.exp()

    return Loss(items, elements, (Role(kind="log_rates"), ALWAYS_ZERO), "counts", link=link)


@register("zero_inflated_negative_binomial")
def zero_inflated_negative_binomial() -> Loss:
    """Counts of `negative_binomial` of which some are always 0: also outputs `always_zero` logits.

    Greene, Accounting for Excess Zeros, 1994. Mean over elements; serves the mean count.
    """

    def items(
        prediction: Tensor, dispersion: Tensor, always_zero: Tensor, target: Tensor
    ) -> Tensor:
        _refuse_other_shape(prediction, dispersion=dispersion, always_zero=always_zero)
        counts = _negative_binomial(prediction.double(), dispersion, target.double())
        return _zero_inflated(counts, always_zero, target).to(prediction.dtype)

    def link(prediction: Tensor, dispersion: Tensor, always_zero: Tensor) -> Tensor:
        return (-always_zero).sigmoid() * prediction.exp()

    roles = (Role(kind="log_rates"), DISPERSION, ALWAYS_ZERO)
    return Loss(items, elements, roles, "counts", link=link)


def _negative_binomial(log_mean: Tensor, dispersion: Tensor, count: Tensor) -> Tensor:
    """Log-likelihood of the counts, float64."""
    size = 1 / dispersion.double().clamp(min=LEAST_DISPERSION)
    log_total = torch.logaddexp(size.log(), log_mean)
    known = torch.lgamma(count + size) - torch.lgamma(size) - torch.lgamma(count + 1)
    return known + size * (size.log() - log_total) + count * (log_mean - log_total)


def _zero_inflated(counted: Tensor, always_zero: Tensor, target: Tensor) -> Tensor:
    """Minus the log-likelihood, from that of the counts that are not always 0."""
    logit = always_zero.double()
    either = torch.where(target == 0, torch.logaddexp(logit, counted), counted)
    return -F.logsigmoid(-logit) - either


def _refuse_other_shape(prediction: Tensor, **others: Tensor) -> None:
    for name, other in others.items():
        if other.shape != prediction.shape:
            shapes = tuple(other.shape), tuple(prediction.shape)
            raise ValueError(f"{name} {shapes[0]} against prediction {shapes[1]}")
