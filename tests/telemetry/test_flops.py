"""FLOPs of a row by hand, and the devices whose most is known."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

from pipeline import registry
from pipeline.data.batch import Batch
from pipeline.data.columns import Number
from pipeline.losses.contract import build
from pipeline.losses.objective import Objective
from pipeline.losses.terms import Term
from pipeline.telemetry.flops import flops_per_row, peak_flops

CPU = torch.device("cpu")
BATCH: Batch = {"x": torch.randn(100, 5), "y": torch.randn(100, 1)}


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.norm, self.output = nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 1)

    def forward(self, batch: Batch) -> Tensor:
        x = batch["x"]
        assert isinstance(x, Tensor)
        out: Tensor = self.output(torch.dropout(self.norm(self.hidden(x)), 0.5, True))
        return out


class Locked(Perceptron):
    """Cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, batch: Batch) -> Tensor:
        x = batch["x"]
        assert isinstance(x, Tensor)
        return self.weight * x.sum(1, keepdim=True)


def objective(model: nn.Module) -> Objective:
    loss = build(registry.losses["mse"], {})
    term = Term("mse", 1.0, loss, ("prediction",), (Number("y", "float", "target"),))
    return Objective(model, ["x"], [term], {"prediction": 1})


def test_a_perceptrons_are_those_of_its_matrices() -> None:
    """2 n m forward and for the weights' gradient, and for the input's where there is one."""
    forward, weights, inputs = 2 * (5 * 7 + 7), 2 * (5 * 7 + 7), 2 * 7
    assert flops_per_row(objective(Perceptron()), BATCH, CPU) == forward + weights + inputs


def test_nothing_is_left_of_the_count() -> None:
    bound = objective(Perceptron())
    before = {name: tensor.clone() for name, tensor in bound.state_dict().items()}
    flops_per_row(bound, BATCH, CPU)
    assert all(torch.equal(before[name], now) for name, now in bound.state_dict().items())
    assert all(parameter.grad is None for parameter in bound.parameters())


@pytest.mark.parametrize("model", [Locked(), Sum()], ids=["cannot be copied", "no matrices"])
def test_a_model_without_a_count_has_none(model: nn.Module) -> None:
    assert flops_per_row(objective(model), BATCH, CPU) is None


@pytest.mark.parametrize(
    ("name", "precision", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756),
        ("NVIDIA H200", torch.float32, 67),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312),
        ("NVIDIA A100-SXM4-80GB", torch.float32, 19.5),
        ("NVIDIA L40S", torch.bfloat16, 362),
        ("NVIDIA L4", torch.bfloat16, 121),
        ("NVIDIA L4", torch.float64, None),
        ("NVIDIA A10G", torch.bfloat16, None),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, None),
    ],
)
def test_a_device_is_known_by_its_whole_name(
    name: str, precision: torch.dtype, teraflops: float | None
) -> None:
    peak = peak_flops(name, precision)
    assert peak == (None if teraflops is None else teraflops * 1e12)


def test_tf32_counts_where_torch_may_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak_flops("NVIDIA A100-SXM4-40GB", torch.float32) == 156e12
    assert peak_flops("NVIDIA A100-SXM4-40GB", torch.float64) == 19.5e12
