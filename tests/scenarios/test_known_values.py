"""Numbers anyone can check by hand, through the registry."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline import registry
from pipeline.losses.contract import build


def mean(name: str, prediction: Tensor, target: Tensor) -> float:
    loss = build(registry.losses[name], {})
    assert loss.denominator is not None
    numerator = loss.items(prediction, target).sum()
    return float(numerator / loss.denominator(len(target), target).sum())


def test_mse_of_three_near_misses() -> None:
    prediction, target = torch.tensor([1.2, 2.3, 3.4]), torch.tensor([1.0, 2.0, 3.0])
    assert mean("mse", prediction, target) == pytest.approx(0.096667, abs=1e-6)


def test_cross_entropy_of_two_rows_and_three_classes() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [2.0, 3.0, 1.0]])
    assert mean("cross_entropy", logits, torch.tensor([2, 1])) == pytest.approx(0.407606, abs=1e-6)


def test_bce_of_two_sigmoids() -> None:
    prediction = torch.tensor([0.2, 0.8]).sigmoid()
    target = torch.tensor([0.0, 1.0])
    assert mean("bce", prediction, target) == pytest.approx(0.584620, abs=1e-6)
