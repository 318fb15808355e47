"""Optimizers of `torch.optim`, and schedules as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from pipeline import registry
from pipeline.registry import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor, optim
    from torch.optim import Optimizer
else:
    torch, optim = lazy("torch"), lazy("torch.optim")

Rate = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]

optimizer = registry.optimizers.register
schedule = registry.schedules.register


def _can_fuse(parameters: Sequence[Tensor]) -> bool:
    """Whether torch's fused kernels may update them: they walk real numbers in memory's order.

    A parameter with gaps in its memory, as a slice has, would be updated in the gaps.
    """
    return all(
        p.is_floating_point() and torch.empty_like(p).stride() == p.stride() for p in parameters
    )


@optimizer("sgd")
def sgd(
    parameters: Sequence[Tensor],
    *,
    lr: Rate = 1e-3,
    momentum: Beta = 0.0,
    weight_decay: Decay = 0.0,
    nesterov: bool = False,
) -> Optimizer:
    """Gradient descent, with momentum if given (torch.optim.SGD)."""
    return optim.SGD(
        parameters,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        nesterov=nesterov,
        fused=_can_fuse(parameters),
    )


@optimizer("adam")
def adam(
    parameters: Sequence[Tensor],
    *,
    lr: Rate = 1e-3,
    betas: tuple[Beta, Beta] = (0.9, 0.999),
    eps: Rate = 1e-8,
    weight_decay: Decay = 0.0,
    amsgrad: bool = False,
) -> Optimizer:
    """Adam (torch.optim.Adam)."""
    return optim.Adam(
        parameters,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        amsgrad=amsgrad,
        fused=_can_fuse(parameters),
    )


@optimizer("adamw")
def adamw(
    parameters: Sequence[Tensor],
    *,
    lr: Rate = 1e-3,
    betas: tuple[Beta, Beta] = (0.9, 0.999),
    eps: Rate = 1e-8,
    weight_decay: Decay = 0.01,
) -> Optimizer:
    """Adam with weight decay apart from the gradient (torch.optim.AdamW)."""
    return optim.AdamW(
        parameters,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        fused=_can_fuse(parameters),
    )


@optimizer("nadam")
def nadam(
    parameters: Sequence[Tensor],
    *,
    lr: Rate = 2e-3,
    betas: tuple[Beta, Beta] = (0.9, 0.999),
    weight_decay: Decay = 0.0,
) -> Optimizer:
    """Adam with Nesterov momentum (torch.optim.NAdam)."""
    return optim.NAdam(parameters, lr=lr, betas=betas, weight_decay=weight_decay)


@optimizer("radam")
def radam(
    parameters: Sequence[Tensor],
    *,
    lr: Rate = 1e-3,
    betas: tuple[Beta, Beta] = (0.9, 0.999),
    weight_decay: Decay = 0.0,
) -> Optimizer:
    """Adam that warms up by itself (torch.optim.RAdam)."""
    return optim.RAdam(parameters, lr=lr, betas=betas, weight_decay=weight_decay)


@optimizer("rmsprop")
def rmsprop(
    parameters: Sequence[Tensor],
    *,
    lr: Rate = 0.01,
    alpha: Beta = 0.99,
    momentum: Beta = 0.0,
    weight_decay: Decay = 0.0,
) -> Optimizer:
    """Gradients divided by their recent size (torch.optim.RMSprop)."""
    return optim.RMSprop(
        parameters, lr=lr, alpha=alpha, momentum=momentum, weight_decay=weight_decay
    )


@optimizer("adagrad")
def adagrad(
    parameters: Sequence[Tensor], *, lr: Rate = 0.01, weight_decay: Decay = 0.0
) -> Optimizer:
    """Gradients divided by their whole past, for sparse features (torch.optim.Adagrad)."""
    return optim.Adagrad(parameters, lr=lr, weight_decay=weight_decay)


@optimizer("adafactor")
def adafactor(
    parameters: Sequence[Tensor], *, lr: Rate = 0.01, weight_decay: Decay = 0.0
) -> Optimizer:
    """Adam with far less memory for large matrices (torch.optim.Adafactor)."""
    return optim.Adafactor(parameters, lr=lr, weight_decay=weight_decay)


# A schedule takes progress in [0, 1) after the warm-up and the step, and gives a factor of `lr`.


@schedule("constant")
def constant(progress: float, step: int) -> float:
    """The same learning rate throughout."""
    return 1.0


@schedule("cosine")
def cosine(progress: float, step: int, *, final: Fraction = 0.0) -> float:
    """Half a cosine from 1 to `final` over the whole run."""
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


@schedule("linear")
def linear(progress: float, step: int, *, final: Fraction = 0.0) -> float:
    """A straight line from 1 to `final` over the whole run."""
    return 1 - (1 - final) * progress


@schedule("step")
def step_decay(
    progress: float, step: int, *, every_steps: Annotated[int, Field(gt=0)], factor: Fraction = 0.1
) -> float:
    """Multiplied by `factor` after every `every_steps` steps."""
    return float(factor ** (step // every_steps))


@schedule("exponential")
def exponential(
    progress: float, step: int, *, final: Annotated[float, Field(gt=0, le=1)] = 0.01
) -> float:
    """Shrinks by the same factor each step, to `final` at the end."""
    return float(final**progress)


@schedule("inverse_sqrt")
def inverse_sqrt(
    progress: float, step: int, *, scale_steps: Annotated[int, Field(gt=0)] = 1000
) -> float:
    """1 / sqrt(1 + step / scale_steps): for runs whose length is open."""
    return 1 / math.sqrt(1 + step / scale_steps)


def learning_rate_factor(
    name: str, options: dict[str, Any], warmup_steps: int, step: int, num_steps: int
) -> float:
    """Factor of the learning rate at `step` (from 0) of `num_steps`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    after, left = step - warmup_steps, max(num_steps - warmup_steps, 1)
    return float(registry.schedules[name].build(after / left, after, **options))
