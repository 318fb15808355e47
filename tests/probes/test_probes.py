"""Whatever breaks the promise is named with its cause, and nothing else is."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.losses.objective import Objective
from pipeline.probes import suspects
from pipeline.probes.steadiness import draws

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
    "centred": (Call(lambda h: h - h.mean(0)), "middle (Call): gives a row different numbers"),
    "centred, behind dropout": (
        Call(lambda h, drop: drop(h) - h.mean(0), nn.Dropout(0.3)),
        "middle (Call): gives a row different numbers",
    ),
    "a generator of its own": (
        Call(lambda h: h * torch.rand(h.shape, generator=OWN)),
        "middle (Call): gives different numbers for the same rows and seed",
    ),
}


def asked(middle: nn.Module, precision: torch.dtype = torch.float32, times: int = 3) -> list[str]:
    objective = Objective(Around(middle), ["x"], [], {"prediction": None})
    objective.precision = precision
    batch: Any = {"x": torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(1))}
    return [str(suspect) for suspect in suspects(objective, batch, 8, times=times)]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", HONEST)
def test_modules_that_keep_the_promise_are_not_named(name: str, precision: torch.dtype) -> None:
    assert asked(HONEST[name], precision) == []


@pytest.mark.parametrize("name", FAULTY)
def test_the_innermost_faulty_module_is_named(name: str) -> None:
    middle, expected = FAULTY[name]
    (found,) = asked(middle)
    assert found.startswith(expected)


def test_a_model_that_draws_random_numbers_is_recognised() -> None:
    for middle, expected in ((nn.Dropout(0.5), "middle (Dropout)"), (nn.Identity(), None)):
        objective = Objective(Around(middle), ["x"], [], {"prediction": None})
        assert draws(objective, {"x": torch.ones(8, 4)}) == expected


class Counter(nn.Module):
    """Acts when it was called often enough, which no state says."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        return hidden * 0.5 if self.calls > 60 else hidden


class Hooked(nn.Linear):
    """Clips, or normalises, the gradient of each micro-batch by a hook."""

    def __init__(self, hook: Any, is_late: bool = False) -> None:
        super().__init__(WIDTH, WIDTH)
        register = self.weight.register_post_accumulate_grad_hook if is_late else None
        (register or self.weight.register_hook)(hook)  # type: ignore[no-untyped-call]


def halved(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad /= parameter.grad.norm()


def with_hook(hidden: Tensor) -> Tensor:
    if hidden.requires_grad:
        hidden.register_hook(lambda gradient: gradient / (1 + 1e-3 * gradient.norm()))  # type: ignore[no-untyped-call]
    return hidden


DEEP: dict[str, tuple[nn.Module, list[str]]] = {
    "rows coupled by 2e-4": (
        Call(lambda h: h * (1 + 2e-4 * h.mean())),
        ["middle (Call)", "gives a row different numbers when other rows are beside it"],
    ),
    "a number of rows": (
        Call(lambda h: h * (1 + 1e-3 * len(h))),
        ["middle (Call)", "gives a row different numbers when other rows are beside it"],
    ),
    "a counter": (Counter(), ["middle (Counter)", "after many calls", "keeps `calls`"]),
    "Python's random numbers": (
        Call(lambda h: h * (1 + random.random())),
        ["middle (Call)", "draws from Python's or NumPy's random numbers"],
    ),
    "NumPy's random numbers": (
        Call(lambda h: h * float(np.random.rand())),
        ["middle (Call)", "draws from Python's or NumPy's random numbers"],
    ),
    "a clipping hook": (
        Hooked(lambda gradient: gradient.clamp(-1, 1)),
        ["middle (Hooked)", "the gradient hook on `weight` acts on each micro-batch's part"],
    ),
    "a normalising hook after accumulation": (
        Hooked(halved, is_late=True),
        ["middle (Hooked)", "the gradient hook on `weight` acts on each micro-batch's part"],
    ),
    "a hook inside": (
        Call(with_hook), ["middle (Call)", "a hook, or its own backward pass, acts on each"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DEEP)
def test_a_fault_that_is_weak_late_or_in_the_gradient_is_named_with_its_cause(name: str) -> None:
    middle, expected = DEEP[name]
    (found,) = asked(middle, times=80)
    for text in expected:
        assert text in found


def test_hooks_that_act_on_any_part_alike_are_not_named() -> None:
    for hook in (lambda g: 2 * g, lambda g: g * (torch.arange(WIDTH) % 2)):
        assert asked(Hooked(hook)) == []


class Bag(nn.Module):
    """As many ids as rows, one each: no length tells them from rows."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(5, WIDTH)

    def forward(self, rows: Tensor) -> Tensor:
        ids = (rows[:, 0].abs() * 2).long().clamp(max=4)
        made: Tensor = self.bag(ids, torch.arange(len(ids)))
        return rows + made


class RowClip(nn.Module):
    """What acts on the gradient of each row's own numbers acts alike in any cut."""

    def forward(self, rows: Tensor) -> Tensor:
        made = rows * 1.0
        if made.requires_grad:
            made.register_hook(lambda gradient: gradient.clamp(-0.1, 0.1))  # type: ignore[no-untyped-call]
        return made


class First(nn.Module):
    def forward(self, rows: Tensor) -> Tensor:
        return rows - 0.01 * rows[:1]


class Larger(nn.Module):
    """Acts on batches of the job's own size only."""

    def forward(self, rows: Tensor) -> Tensor:
        return rows if len(rows) > 8 else rows * 1.5


@pytest.mark.parametrize("middle", [Bag(), RowClip()], ids=lambda m: type(m).__name__)
def test_a_module_whose_rows_are_independent_is_not_named(middle: nn.Module) -> None:
    assert asked(middle) == []


@pytest.mark.parametrize(("middle", "who"), [(First(), "middle (First)"), (Larger(), "model")])
def test_what_couples_rows_in_some_cuts_only_is_named(middle: nn.Module, who: str) -> None:
    fault = "gives a row different numbers when other rows are beside it"
    assert asked(middle) == [f"{who}: {fault}"]
