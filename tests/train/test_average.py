"""Averaged weights: torch's own formulas, at the right steps, and back to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import swa_utils

from pipeline.spec.sections import Average
from pipeline.train.average import WeightAverage

NUM_STEPS, STEPS_PER_EPOCH = 20, 4


def network() -> nn.Module:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(5)
    norm.num_batches_tracked = None  # torch's equal average fails on whole numbers
    return nn.Sequential(nn.Linear(3, 5), norm, nn.Linear(5, 2))


EMA = swa_utils.get_ema_multi_avg_fn(0.9)  # type: ignore[no-untyped-call]
SWA = swa_utils.get_swa_multi_avg_fn()  # type: ignore[no-untyped-call]


def run(
    module: nn.Module, average: WeightAverage, reference: Any, enters: range | list[int]
) -> None:
    """Steps of changing weights and statistics; the reference takes in those of `enters`."""
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    for step in range(1, NUM_STEPS + 1):
        optimizer.zero_grad()
        module(torch.randn(7, 3)).square().sum().backward()
        optimizer.step()
        average.update(step, module)
        if step in enters:
            reference.update_parameters(module)


@pytest.mark.parametrize(
    ("settings", "multi_avg_fn", "enters"),
    [
        ({"ema": 0.9}, EMA, range(1, NUM_STEPS + 1)),
        ({"swa": {"start": 0.5}}, SWA, [12, 16, 20]),
        ({"swa": {"start": 0, "every": {"steps": 3}}}, SWA,
         [3, 6, 9, 12, 15, 18]),
    ],
)  # fmt: skip
def test_averages_are_torchs(
    settings: dict[str, Any], multi_avg_fn: Any, enters: range | list[int]
) -> None:
    module = network()
    reference = swa_utils.AveragedModel(module, multi_avg_fn=multi_avg_fn, use_buffers=True)
    average = WeightAverage(Average.model_validate(settings), NUM_STEPS, STEPS_PER_EPOCH)
    run(module, average, reference, enters)
    own = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    wanted = reference.module.state_dict()
    with average.applied(module):
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=1e-7)
                assert not torch.equal(tensor, own[name])
    assert all(torch.equal(tensor, own[name]) for name, tensor in module.state_dict().items())
    assert average.state["count"] == len(enters)


def test_before_its_first_step_the_weights_themselves_are_evaluated() -> None:
    module = network()
    own = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    average = WeightAverage(Average(ema=0.9), NUM_STEPS, STEPS_PER_EPOCH)
    with average.applied(module):
        assert all(torch.equal(tensor, own[name]) for name, tensor in module.state_dict().items())


def test_a_snapshot_is_left_alone_by_later_steps() -> None:
    module = network()
    average = WeightAverage(Average(ema=0.9), NUM_STEPS, STEPS_PER_EPOCH)
    average.update(1, module)
    saved = average.snapshot()
    first = saved["tensors"]["0.weight"].clone()
    resumed = WeightAverage(Average(ema=0.9), NUM_STEPS, STEPS_PER_EPOCH)
    resumed.restore(saved, torch.device("cpu"))
    with torch.no_grad():
        module.get_parameter("0.weight").add_(1.0)
    average.update(2, module)
    resumed.update(2, module)
    assert torch.equal(saved["tensors"]["0.weight"], first)
    assert torch.equal(average.state["tensors"]["0.weight"], resumed.state["tensors"]["0.weight"])
