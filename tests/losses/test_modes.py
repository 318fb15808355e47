"""Evaluation is a visit: afterwards each submodule is as it was."""

from __future__ import annotations

import pytest
from torch import nn

from pipeline.losses.modes import evaluating


def test_each_submodule_is_as_it_was_afterwards() -> None:
    module = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2), nn.ReLU()))
    module.train()
    module[1].eval()
    module[1][1].train()  # type: ignore[index]
    before = [submodule.training for submodule in module.modules()]
    with evaluating(module):
        assert not any(submodule.training for submodule in module.modules())
    assert [submodule.training for submodule in module.modules()] == before


def test_also_after_an_error() -> None:
    module = nn.Dropout()
    with pytest.raises(ZeroDivisionError), evaluating(module):
        raise ZeroDivisionError
    assert module.training
