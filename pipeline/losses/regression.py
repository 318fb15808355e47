"""Losses of amounts: of the mean, the median, any quantile, and with their uncertainty."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from pipeline.losses.contract import Loss, Role, elements, register, rows
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


@register("pinball")
def pinball(
    *,
    levels: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=1)] = [  # noqa: B006
        0.1,
        0.5,
        0.9,
    ],
) -> Loss:
    """Quantiles of an amount at several `levels` at once: one output [N, levels].

    Koenker and Bassett, Regression Quantiles, 1978. Mean over rows and levels. What is served is
    sorted, as no quantile is above one of a higher level.
    """
    if sorted(set(levels)) != levels:
        raise ValueError(f"levels must rise: {levels}")

    def items(prediction: Tensor, target: Tensor) -> Tensor:
        excess = target[:, None] - prediction
        level = prediction.new_tensor(levels)
        return torch.maximum(level * excess, (level - 1) * excess)

    def denominator(num_rows: int, target: Tensor) -> Tensor:
        return rows(num_rows) * len(levels)

    def link(prediction: Tensor) -> Tensor:
        return prediction.sort(1).values

    role = Role(size=len(levels))
    return Loss(items, denominator, (role,), "quantiles", "rows", link, levels=tuple(levels))


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
