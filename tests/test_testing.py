"""`pipeline.testing`: good losses pass, and each way to be inexact is named."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pipeline
from pipeline import registry
from pipeline.data.batch import Batch
from pipeline.data.columns import Field
from pipeline.errors import ContractError, UsageError
from pipeline.losses import per_item
from pipeline.losses.bind import Output
from pipeline.models.parts import Features, Outputs
from pipeline.testing import check_loss, check_model

PREDICTION = torch.linspace(-1, 2, 8)
TARGET = torch.tensor([0.5, -0.3, 1.2, 0.1, 2.0, -1.0, 0.7, 0.9])


@pytest.fixture(autouse=True)
def _registries_as_before() -> Iterator[None]:
    kinds = (registry.losses, registry.models)
    before = [dict(kind.entries) for kind in kinds]
    yield
    for kind, entries in zip(kinds, before, strict=True):
        kind._entries.clear()
        kind._entries.update(entries)


def test_built_in_losses_pass() -> None:
    check_loss("mse", PREDICTION, TARGET)
    check_loss("huber", PREDICTION, TARGET, delta=0.7)
    check_loss("bce_with_logits", PREDICTION, (TARGET > 0).double(), pos_weight=2.0)
    check_loss("gaussian_nll", PREDICTION, PREDICTION**2 + 0.1, TARGET)
    logits = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    classes = torch.tensor([0, 1, 2, -100, 1, 0, 2, 2])
    check_loss("cross_entropy", logits, classes, class_weight=[1.0, 2.0, 0.5])


def test_a_custom_loss_of_rows_passes() -> None:
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
def test_each_broken_loss_is_explained(name: str) -> None:
    function, expected = BROKEN[name]
    pipeline.losses.register(name)(lambda prediction, target: function(prediction, target))
    with pytest.raises(ContractError, match=expected):
        check_loss(name, PREDICTION, TARGET)


def test_a_denominator_that_lies_is_found() -> None:
    @pipeline.losses.register("t_lying_of_testing")
    def t_lying() -> object:
        made = per_item(lambda p, t: (p - t) ** 2)
        lying = lambda num_rows, target: torch.full((num_rows,), float(num_rows))  # noqa: E731
        return type(made)(**{**made.__dict__, "denominator": lying})

    with pytest.raises(ContractError, match="denominators of rows"):
        check_loss("t_lying_of_testing", PREDICTION, TARGET)


class Net(nn.Module):
    """An honest small model; the broken ones below change one thing."""

    def __init__(self, inputs: dict[str, Field], outputs: dict[str, Output], *, width: int = 8):
        super().__init__()
        self.features = Features(inputs)
        self.hidden = nn.Linear(self.features.width, width)
        self.outputs = Outputs(width, outputs)

    def middle(self, hidden: Tensor) -> Tensor:
        return hidden.relu()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        made: dict[str, Tensor] = self.outputs(self.middle(self.hidden(self.features(batch))))
        return made


class Noisy(Net):
    def middle(self, hidden: Tensor) -> Tensor:
        return hidden + torch.from_numpy(np.random.default_rng().normal(size=hidden.shape)).float()


class Centred(Net):
    def middle(self, hidden: Tensor) -> Tensor:
        return hidden - hidden.mean(0)


class Idle(Net):
    def __init__(self, inputs: dict[str, Field], outputs: dict[str, Output]):
        super().__init__(inputs, outputs)
        self.unused = nn.Linear(2, 2)


class Hidden(Net):
    def __init__(self, inputs: dict[str, Field], outputs: dict[str, Output]):
        super().__init__(inputs, outputs)
        self.offset = torch.randn(8, generator=torch.Generator().manual_seed(next(COUNT)))

    def middle(self, hidden: Tensor) -> Tensor:
        return hidden + self.offset


class Endless(Net):
    def middle(self, hidden: Tensor) -> Tensor:
        return hidden / 0


class Full(Net):
    def middle(self, hidden: Tensor) -> Tensor:
        return hidden - hidden[0].detach() * 0


COUNT = itertools.count()
COLUMNS = {"age": [31.0, 47.5, 52.0, 28.0, 60.0], "city": ["A", "B", "A", "C", "B"]}
BROKEN_MODELS = {
    "gives different numbers for the same rows": Noisy,
    "when other rows are beside it": Centred,
    r"no output depends on unused|depends on .*unused": Idle,
    "more than its state_dict": Hidden,
    "is not finite": Endless,
    "fails on no rows": Full,
}


def test_good_models_pass() -> None:
    pipeline.models.register("t_net")(Net)
    check_model("t_net", COLUMNS, width=16)
    check_model("t_net", COLUMNS, outputs={"mean": None, "classes": 3})
    check_model("mlp", COLUMNS, hidden=[4], dropout=0.5)
    tokens = [[1, 2, 3], [2, 0], [3, 3, 1, 0], [1]]
    check_model("transformer", {"tokens": tokens}, outputs={"prediction": 4}, width=8, num_heads=2)


@pytest.mark.parametrize("expected", BROKEN_MODELS)
def test_each_broken_model_is_explained(expected: str) -> None:
    pipeline.models.register("t_broken")(BROKEN_MODELS[expected])
    with pytest.raises(UsageError, match=expected):
        check_model("t_broken", COLUMNS)


def test_images_are_given_as_arrays() -> None:
    images = np.random.default_rng(0).normal(size=(6, 8, 8)).astype(np.float32)
    check_model("cnn", {"image": images}, outputs={"prediction": 3}, channels=[4])


@pytest.mark.parametrize(
    ("arguments", "options", "expected"),
    [
        (([1.0, 2.0], TARGET), {}, "cannot be checked on a list"),
        ((PREDICTION, TARGET[:5]), {}, "was given 8, 5 rows"),
        ((PREDICTION, TARGET), {"dleta": 1.0}, "option dleta: .*\n.*options: delta"),
    ],
)
def test_a_probe_that_fails_is_reported(arguments: Any, options: Any, expected: str) -> None:
    with pytest.raises(ContractError, match=expected):
        check_loss("huber", *arguments, **options)


def test_a_loss_of_the_whole_batch_is_checked_as_one() -> None:
    @pipeline.losses.register("t_whole", per="batch")
    def t_whole(prediction: Tensor, target: Tensor) -> Tensor:
        return ((prediction - target) ** 2).mean().sqrt()

    check_loss("t_whole", PREDICTION, TARGET)
    check_loss("info_nce", torch.randn(5, 3), torch.randn(5, 3))

    @pipeline.losses.register("t_not_whole", per="batch")
    def t_not_whole(prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target) ** 2

    with pytest.raises(ContractError, match="declared per batch"):
        check_loss("t_not_whole", PREDICTION, TARGET)
