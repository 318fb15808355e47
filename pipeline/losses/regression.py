"""Losses of amounts: `mse`, `l1`, `smooth_l1`, `huber`, `gaussian_nll`, `poisson_nll`."""

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

Positive = Annotated[float, Field(gt=0)]


@register("mse")
def mse() -> Loss:
    """Squared error, for amounts. Mean over elements (torch.nn.MSELoss)."""
    return Loss(lambda p, t: F.mse_loss(p, t, reduction="none"), elements)


@register("l1")
def l1() -> Loss:
    """Absolute error: the median, unmoved by outliers. Mean over elements (torch.nn.L1Loss)."""
    return Loss(lambda p, t: F.l1_loss(p, t, reduction="none"), elements)


@register("smooth_l1")
def smooth_l1(*, beta: Annotated[float, Field(ge=0)] = 1.0) -> Loss:
    """Squared below `beta` and divided by it, absolute above. Mean over elements."""
    return Loss(lambda p, t: F.smooth_l1_loss(p, t, reduction="none", beta=beta), elements)


@register("huber")
def huber(*, delta: Positive = 1.0) -> Loss:
    """Squared below `delta`, linear above: amounts with outliers. Mean over elements."""
    return Loss(lambda p, t: F.huber_loss(p, t, reduction="none", delta=delta), elements)


@register("gaussian_nll")
def gaussian_nll(*, full: bool = False, eps: Positive = 1e-6) -> Loss:
    """Normal likelihood of outputs `mean` and `variance`: amounts with their uncertainty."""

    def items(mean: Tensor, variance: Tensor, target: Tensor) -> Tensor:
        if variance.shape != mean.shape and variance.shape[1:] != (1,):
            raise ValueError(f"variance {tuple(variance.shape)} against mean {tuple(mean.shape)}")
        return F.gaussian_nll_loss(mean, target, variance, full=full, eps=eps, reduction="none")

    roles = (Role("mean"), Role("variance", "variances", activation="softplus"))
    return Loss(items, elements, roles, link=lambda mean, variance: mean)


@register("poisson_nll")
def poisson_nll(*, log_input: bool = True, full: bool = False, eps: Positive = 1e-8) -> Loss:
    """Poisson likelihood of counts; predicts the log of the rate. Mean over elements."""

    def items(prediction: Tensor, target: Tensor) -> Tensor:
        return F.poisson_nll_loss(
            prediction, target, log_input=log_input, full=full, eps=eps, reduction="none"
        )

    role = Role(kind="log_rates") if log_input else Role(kind="rates", activation="softplus")
    link = torch.exp if log_input else None
    return Loss(items, elements, (role,), "counts", link=link)
