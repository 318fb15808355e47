"""Suspects: what couples rows or ignores the seed is named, everything else is left in peace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.losses.objective import Objective
from pipeline.suspects import draws, suspects

ROWS, WIDTH = 32, 16


class Around(nn.Module):
    """A module between two layers, on columns [N, WIDTH]."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.middle, self.after = nn.Linear(4, WIDTH), middle, nn.Linear(WIDTH, 1)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        made = self.middle(self.before(batch["x"]))
        return self.after(made).squeeze(1)  # type: ignore[no-any-return]


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Any, *modules: nn.Module) -> None:
        super().__init__()
        self.function, self.inner = function, nn.ModuleList(modules)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.function(hidden, *self.inner)  # type: ignore[no-any-return]


def as_steps(hidden: Tensor, *inner: nn.Module) -> Tensor:
    """Each row as a sequence of four steps."""
    steps = hidden.reshape(len(hidden), 4, WIDTH // 4)
    made = inner[0](steps)
    made = made[0] if isinstance(made, tuple) else made
    return made.reshape(len(hidden), WIDTH)  # type: ignore[no-any-return]


def masked(hidden: Tensor, *inner: nn.Module) -> Tensor:
    """Sequences as long as there are rows, with a causal mask of [ROWS, ROWS]."""
    steps = hidden[:, None, :4].expand(len(hidden), ROWS, 4)
    made = inner[0](steps, src_mask=nn.Transformer.generate_square_subsequent_mask(ROWS))
    return hidden + made.mean(1).repeat(1, 4)  # type: ignore[no-any-return]


def first_dimension_is_the_sequence(hidden: Tensor, *inner: nn.Module) -> Tensor:
    steps = hidden[:, None, :4].expand(len(hidden), ROWS, 4).transpose(0, 1)
    return hidden + inner[0](steps).mean(0).repeat(1, 4)  # type: ignore[no-any-return]


def encoder(batch_first: bool = True) -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=batch_first)


class Average(nn.Module):
    """Keeps a moving average that outputs use, as codebooks do."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * hidden.detach().mean(0)
        return hidden


OWN = torch.Generator()
HONEST: dict[str, nn.Module] = {
    "layer norm": nn.LayerNorm(WIDTH),
    "group norm": nn.GroupNorm(4, WIDTH),
    "instance norm": Call(as_steps, nn.InstanceNorm1d(4)),
    "dropout": nn.Dropout(0.3),
    "in-place relu": nn.ReLU(inplace=True),
    "lstm": Call(as_steps, nn.LSTM(4, 4, batch_first=True)),
    "attention": Call(as_steps, encoder()),
    "a mask as large as the batch": Call(masked, encoder()),
    "sequence first": Call(first_dimension_is_the_sequence, encoder(batch_first=False)),
    "spectral norm": nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)),
    "moving average": Average(),
}
FAULTY: dict[str, tuple[nn.Module, str]] = {
    "batch norm": (nn.BatchNorm1d(WIDTH), "middle (BatchNorm1d): normalises by the statistics"),
    "centred": (Call(lambda h: h - h.mean(0)), "middle (Call): gives a row other numbers"),
    "centred, behind dropout": (
        Call(lambda h, drop: drop(h) - h.mean(0), nn.Dropout(0.3)),
        "middle (Call): gives a row other numbers",
    ),
    "a generator of its own": (
        Call(lambda h: h * torch.rand(h.shape, generator=OWN)),
        "middle (Call): gives other numbers for the same rows and the same seed",
    ),
}


def asked(middle: nn.Module, precision: torch.dtype = torch.float32) -> list[str]:
    objective = Objective(Around(middle), ["x"], [], {"prediction": None})
    objective.precision = precision
    batch: Any = {"x": torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(1))}
    return [str(suspect) for suspect in suspects(objective, batch, 8)]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", HONEST)
def test_honest_modules_are_left_in_peace(name: str, precision: torch.dtype) -> None:
    assert asked(HONEST[name], precision) == []


@pytest.mark.parametrize("name", FAULTY)
def test_the_innermost_faulty_module_is_named(name: str) -> None:
    middle, expected = FAULTY[name]
    (found,) = asked(middle)
    assert found.startswith(expected)


def test_a_model_that_draws_is_told_from_one_that_does_not() -> None:
    for middle, expected in ((nn.Dropout(0.5), True), (nn.Identity(), False)):
        objective = Objective(Around(middle), ["x"], [], {"prediction": None})
        assert draws(objective, {"x": torch.ones(8, 4)}) is expected
