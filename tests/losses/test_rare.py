"""Losses of rare classes: what they are without a focus, and sure predictions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline import registry
from pipeline.losses.contract import build
from tests.losses.formulas import mean

LOGITS = [[2.0, -1.0, 0.5], [0.0, 0.3, -3.0]]


def test_without_a_focus_they_are_cross_entropy() -> None:
    truth = torch.tensor([0, 2])
    options = {"class_weight": [0.5, 1.0, 3.0]}
    assert mean("focal", LOGITS, truth, gamma=0.0, **options) == pytest.approx(
        mean("cross_entropy", LOGITS, truth, **options)
    )
    answers = [1.0, 0.0]
    plain = mean("bce_with_logits", [0.4, -2.0], answers)
    assert mean("binary_focal", [0.4, -2.0], answers, gamma=0.0, alpha=None) == pytest.approx(plain)
    none = {"gamma_yes": 0.0, "gamma_no": 0.0, "margin": 0.0}
    assert mean("asymmetric", [0.4, -2.0], answers, **none) == pytest.approx(plain)


def test_they_are_the_papers_formulas_by_hand() -> None:
    yes = np.array([0.9, 0.2, 0.6])
    logits, truth = np.log(yes / (1 - yes)), [1.0, 1.0, 0.0]
    parts = [0.25 * 0.1**2 * np.log(0.9), 0.25 * 0.8**2 * np.log(0.2), 0.75 * 0.6**2 * np.log(0.4)]
    assert mean("binary_focal", logits, truth) == pytest.approx(-np.mean(parts))
    parts = [np.log(0.9), np.log(0.2), 0.55**4 * np.log(0.45)]
    assert mean("asymmetric", logits, truth) == pytest.approx(-np.mean(parts))
    shares = np.array([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4]])
    parts = [2.0 * 0.3**2 * np.log(0.7), 1.0 * 0.6**2 * np.log(0.4)]
    got = mean("focal", np.log(shares), torch.tensor([0, 2]), class_weight=[2.0, 5.0, 1.0])
    assert got == pytest.approx(-sum(parts) / 3)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("name", ["focal", "binary_focal", "asymmetric"])
@pytest.mark.parametrize("size", [100.0, -100.0])
def test_sure_predictions_have_finite_losses_and_gradients(
    name: str, gamma: float, size: float
) -> None:
    options = {"gamma_yes": gamma, "gamma_no": gamma} if name == "asymmetric" else {"gamma": gamma}
    given = torch.tensor([[size, -size], [-size, size]], requires_grad=True)
    truth = torch.tensor([0, 0]) if name == "focal" else torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    items = build(registry.losses[name], options).items(given, truth)
    items.sum().backward()  # type: ignore[no-untyped-call]
    assert given.grad is not None
    assert items.isfinite().all()
    assert given.grad.isfinite().all()
