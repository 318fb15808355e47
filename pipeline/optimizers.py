"""Optimizers of `torch.optim`: an entry takes the parameters to train, and its options.

With `optimizer.groups` the parameters come as torch's groups: mappings with `params` and options.
"""

from __future__ import annotations

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
    torch = lazy("torch")
    optim = lazy("torch.optim")

Parameters = Sequence["Tensor"] | Sequence[dict[str, Any]]
Rate = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]

register = registry.optimizers.register


def _can_fuse(parameters: Parameters) -> bool:
    """Whether torch's fused kernels may update them: they walk real numbers in memory's order.

    A parameter with gaps in its memory, as a slice has, would be updated in the gaps; and of
    numbers below float32 the kernel of SGD on CPUs keeps a wrong momentum (torch 2.13).
    """
    tensors = [p for one in parameters for p in (one["params"] if isinstance(one, dict) else [one])]
    return all(
        p.dtype in (torch.float32, torch.float64) and torch.empty_like(p).stride() == p.stride()
        for p in tensors
    )


@register("sgd")
def sgd(
    parameters: Parameters,
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


@register("adam")
def adam(
    parameters: Parameters,
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


@register("adamw")
def adamw(
    parameters: Parameters,
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


@register("nadam")
def nadam(
    parameters: Parameters,
    *,
    lr: Rate = 2e-3,
    betas: tuple[Beta, Beta] = (0.9, 0.999),
    weight_decay: Decay = 0.0,
) -> Optimizer:
    """Adam with Nesterov momentum (torch.optim.NAdam)."""
    return optim.NAdam(parameters, lr=lr, betas=betas, weight_decay=weight_decay)


@register("radam")
def radam(
    parameters: Parameters,
    *,
    lr: Rate = 1e-3,
    betas: tuple[Beta, Beta] = (0.9, 0.999),
    weight_decay: Decay = 0.0,
) -> Optimizer:
    """Adam that warms up by itself (torch.optim.RAdam)."""
    return optim.RAdam(parameters, lr=lr, betas=betas, weight_decay=weight_decay)


@register("rmsprop")
def rmsprop(
    parameters: Parameters,
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


@register("adagrad")
def adagrad(parameters: Parameters, *, lr: Rate = 0.01, weight_decay: Decay = 0.0) -> Optimizer:
    """Gradients divided by their whole past, for sparse features (torch.optim.Adagrad)."""
    return optim.Adagrad(parameters, lr=lr, weight_decay=weight_decay)


@register("adafactor")
def adafactor(parameters: Parameters, *, lr: Rate = 0.01, weight_decay: Decay = 0.0) -> Optimizer:
    """Adam with far less memory for large matrices (torch.optim.Adafactor)."""
    return optim.Adafactor(parameters, lr=lr, weight_decay=weight_decay)
