"""Optimizers take what torch takes."""

from __future__ import annotations

import inspect

import pytest
import torch

from pipeline import registry
from tests.conftest import built_in


@pytest.mark.parametrize("name", built_in("optimizers"))
def test_every_optimizer_lowers_a_loss(name: str) -> None:
    weight = torch.nn.Parameter(torch.full((3, 3), 2.0))
    optimizer = registry.optimizers[name].build([weight])
    for _ in range(20):
        optimizer.zero_grad()
        (weight**2).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert float((weight**2).sum().detach()) < 36


@pytest.mark.parametrize("name", built_in("optimizers"))
def test_defaults_are_torchs_own(name: str) -> None:
    entry = registry.optimizers[name]
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    theirs = inspect.signature(type(entry.build([weight])).__init__).parameters
    for option, field in entry.options.model_fields.items():
        assert field.default == theirs[option].default, option
