"""Losses of counts and costs, whose spread grows with their mean: from the mean's logarithm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from pipeline.losses.contract import Loss, Role, elements, register
from pipeline.registry import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")

LEAST_DISPERSION = 1e-6


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
        if dispersion.shape != prediction.shape:
            shapes = tuple(dispersion.shape), tuple(prediction.shape)
            raise ValueError(f"dispersion {shapes[0]} against prediction {shapes[1]}")
        log_mean, count = prediction.double(), target.double()
        size = 1 / dispersion.double().clamp(min=LEAST_DISPERSION)
        log_total = torch.logaddexp(size.log(), log_mean)
        known = torch.lgamma(count + size) - torch.lgamma(size) - torch.lgamma(count + 1)
        likelihood = known + size * (size.log() - log_total) + count * (log_mean - log_total)
        return -likelihood.to(prediction.dtype)

    def link(prediction: Tensor, dispersion: Tensor) -> Tensor:
        return prediction.exp()

    roles = (Role(kind="log_rates"), Role("dispersion", "variances", activation="softplus"))
    return Loss(items, elements, roles, "counts", link=link)
