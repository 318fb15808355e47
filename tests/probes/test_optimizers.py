"""Optimizers that forget, or draw from elsewhere than torch, are named with the cause."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline import registry
from pipeline.probes.optimizers import unfaithful
from tests.conftest import built_in


class Momentum(torch.optim.SGD):
    """Keeps its momenta beside its state."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr=lr)
        self.momenta: dict[int, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for place, parameter in enumerate(self.param_groups[0]["params"]):
            before = self.momenta.get(place, torch.zeros_like(parameter))
            self.momenta[place] = 0.9 * before + parameter.grad
            parameter -= 0.1 * self.momenta[place]


class Noisy(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        with torch.no_grad():
            self.param_groups[0]["params"][0].add_(float(np.random.rand()))


NAMED = [("weight", nn.Parameter(torch.ones(3, 2)))]


def of(build: Any) -> Any:
    return lambda named: build([p for _, p in named])


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (Momentum, ["continues differently from its state_dict", "`momenta`"]),
        (Noisy, ["moves weights differently for the same gradients", "elsewhere than torch"]),
    ],
)
def test_an_optimizer_is_named_with_its_cause(build: Any, expected: list[str]) -> None:
    (fault,) = [text for _, text in unfaithful("own", of(build), NAMED)]
    for text in expected:
        assert text in fault


@pytest.mark.parametrize("name", built_in("optimizers"))
def test_torchs_own_optimizers_are_not_named(name: str) -> None:
    build = registry.optimizers[name].build
    assert unfaithful(name, of(build), NAMED) == []
