"""`pipeline.testing`: good losses pass, and each way to be inexact is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import pipeline
from pipeline import registry
from pipeline.errors import ContractError
from pipeline.losses import per_item
from pipeline.testing import check_loss

PREDICTION = torch.linspace(-1, 2, 8)
TARGET = torch.tensor([0.5, -0.3, 1.2, 0.1, 2.0, -1.0, 0.7, 0.9])


@pytest.fixture(autouse=True)
def _registry_as_before() -> Iterator[None]:
    before = dict(registry.losses.entries)
    yield
    registry.losses._entries.clear()
    registry.losses._entries.update(before)


def test_built_in_losses_pass() -> None:
    check_loss("mse", PREDICTION, TARGET)
    check_loss("huber", PREDICTION, TARGET, delta=0.7)
    check_loss("bce_with_logits", PREDICTION, (TARGET > 0).double(), pos_weight=2.0)
    check_loss("gaussian_nll", PREDICTION, PREDICTION**2 + 0.1, TARGET)
    logits = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    classes = torch.tensor([0, 1, 2, -100, 1, 0, 2, 2])
    check_loss("cross_entropy", logits, classes, class_weight=[1.0, 2.0, 0.5])


def test_an_own_loss_of_rows_passes() -> None:
    @pipeline.losses.register("t_rows")
    def t_rows(prediction: Tensor, target: Tensor, *, power: float = 2.0) -> Tensor:
        return (prediction - target).abs() ** power

    check_loss("t_rows", PREDICTION, TARGET, power=3.0)


BROKEN: dict[str, tuple[Callable[..., Tensor], str]] = {
    "reduced": (lambda p, t: ((p - t) ** 2).mean(), "without .mean()"),
    "coupled": (lambda p, t: (p - t) ** 2 / (p - t).abs().max(), "couples rows"),
    "by_place": (lambda p, t: (p - t) ** 2 * torch.arange(len(p)), "couples rows"),
    "detached": (lambda p, t: (p - t) * (p - t).detach(), "gradient is not that"),
    "endless": (lambda p, t: (p - t) / 0, "not finite"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_said(name: str) -> None:
    function, expected = BROKEN[name]
    pipeline.losses.register(name)(lambda prediction, target: function(prediction, target))
    with pytest.raises(ContractError, match=expected):
        check_loss(name, PREDICTION, TARGET)


def test_a_denominator_that_lies_is_found() -> None:
    @pipeline.losses.register("t_lying")
    def t_lying() -> object:
        made = per_item(lambda p, t: (p - t) ** 2)
        lying = lambda num_rows, target: torch.full((num_rows,), float(num_rows))  # noqa: E731
        return type(made)(**{**made.__dict__, "denominator": lying})

    with pytest.raises(ContractError, match="denominators of rows"):
        check_loss("t_lying", PREDICTION, TARGET)
