"""Optimizers that are unsteady, or whose `state_dict` is not all of their state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import nn

from pipeline.probes.calls import Found

Named = Iterable[tuple[str, nn.Parameter]]
Build = Callable[[Named], torch.optim.Optimizer]
STEPS = 40
SAVED_AFTER = 4
STANDARD = {"defaults", "state", "param_groups"}


def unfaithful(
    name: str,
    build: Build,
    parameters: Named,
) -> Found:
    """What is wrong with an optimizer, tried on copies of the parameters."""
    trained = [(name, p) for name, p in parameters if p.requires_grad]
    one, other = (_Steps(build, trained) for _ in range(2))
    for step in range(STEPS):
        if step == SAVED_AFTER:
            resumed = _Steps(build, one.named)
            resumed.optimizer.load_state_dict(copy.deepcopy(one.optimizer.state_dict()))
        one.step(step)
        other.step(step)
        if not one.equals(other):
            fault = "moves weights differently for the same gradients and seed"
            return [
                (
                    f"optimizer {name}",
                    f"{fault}: it draws random numbers from elsewhere than "
                    "torch, or shares state with another instance",
                )
            ]
        if step < SAVED_AFTER:
            continue
        resumed.step(step)
        if not one.equals(resumed):
            own = [f"`{key}`" for key in vars(one.optimizer) if _is_own(key, one.optimizer)]
            fault = "continues differently from its state_dict, as after a crash: it keeps state"
            where = f" ({', '.join(own)})" if own else ""
            return [(f"optimizer {name}", f"{fault}{where} outside of self.state")]
    return []


def _is_own(key: str, optimizer: torch.optim.Optimizer) -> bool:
    return not key.startswith("_") and key not in STANDARD and not callable(getattr(optimizer, key))


class _Steps:
    """An optimizer on copies of the parameters."""

    def __init__(self, build: Build, like: Named) -> None:
        self.named = [(name, nn.Parameter(p.detach().clone())) for name, p in like]
        self.weights = [weight for _, weight in self.named]
        self.optimizer = build(self.named)

    def step(self, seed: int) -> None:
        """One step with gradients that its number determines."""
        generator = torch.Generator().manual_seed(seed)
        for weight in self.weights:
            drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight.grad = torch.empty_like(weight).copy_(drawn.to(weight.dtype))
        torch.manual_seed(seed)
        self.optimizer.step()

    def equals(self, other: _Steps) -> bool:
        """Whether the weights are the same, to the bit."""
        both = zip(self.weights, other.weights, strict=True)
        return all(torch.equal(a, b) for a, b in both)
