"""Workers whose states differ are told so, with what differs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from pipeline.distributed.buffers import Buffers
from pipeline.errors import RunError
from pipeline.train import drift
from tests.processes import on_workers

State = tuple[nn.Module, torch.optim.Optimizer]


def trained() -> State:
    """A model with a buffer, and an optimizer that has made a step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(4, 2)).sum().backward()
    optimizer.step()
    return model, optimizer


def weight(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    parameter = model.get_parameter("0.weight")
    parameter.data[0, 0] = torch.nextafter(parameter.data[0, 0], torch.tensor(9.0))


def buffer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.get_buffer("1.running_mean")[1] += 1


def momentum(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.state[model.get_parameter("0.bias")]["exp_avg"][0] += 1


def rate(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["lr"] *= 2


def forgotten(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.state.clear()


def nothing(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    pass


def refused(change: Callable[..., None], rank: int, num: int) -> str:
    model, optimizer = trained()
    if rank == num - 1:
        change(model, optimizer)
    try:
        drift.refuse(model, optimizer, Buffers(model, {}), 7)
    except RunError as error:
        return str(error)
    return ""


@pytest.mark.processes
@pytest.mark.parametrize(
    ("change", "name"),
    [
        (weight, "0.weight"),
        (buffer, "1.running_mean"),
        (momentum, "exp_avg of 0.bias"),
        (rate, "the optimizer's lr (group 0)"),
        (forgotten, "names in the optimizer's state"),
    ],
)
def test_every_worker_names_what_differs(change: Callable[..., None], name: str) -> None:
    for message in on_workers(3, partial(refused, change)):
        assert f"after step 7 the workers no longer hold the same {name}:" in message


@pytest.mark.processes
def test_equal_states_are_taken() -> None:
    assert on_workers(2, partial(refused, nothing)) == ["", ""]
