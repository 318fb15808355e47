"""FLOPs of a row by hand, and the devices whose most is known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pipeline
from pipeline import registry
from pipeline.data.batch import Batch
from pipeline.data.columns import Field, Number
from pipeline.losses.bind import Output
from pipeline.losses.contract import build
from pipeline.losses.objective import Objective
from pipeline.losses.terms import Term
from pipeline.models.parts import Features, Outputs
from pipeline.rundir import RunDir
from pipeline.rundir.journal import Reader, curve_sha256
from pipeline.spec import load
from pipeline.telemetry.flops import flops_per_row, peak_flops
from pipeline.train import loop
from pipeline.train.job import prepare
from pipeline.train.loop import train
from tests.conftest import JOBS

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


class Attention(nn.Module):
    def forward(self, batch: Batch) -> Tensor:
        query, key, value = self.heads(batch["x"]).view(-1, 1, 5, 3 * 4).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(query, key, value).sum((1, 2, 3))[:, None]

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.Linear(5, 5 * 3 * 4)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(1, 6, batch_first=True)

    def forward(self, batch: Batch) -> Tensor:
        x = batch["x"]
        assert isinstance(x, Tensor)
        out: Tensor = self.layer(x[:, :, None])[0].sum((1, 2))[:, None]
        return out


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, batch: Batch) -> Tensor:
        raise ArithmeticError


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


def test_attentions_are_those_of_its_matrices() -> None:
    """Five positions of four numbers: scores and sums of values, twice that backward."""
    products = 2 * 2 * (5 * 4 * 5)
    layer = 2 * 2 * (5 * 60)
    assert flops_per_row(objective(Attention()), BATCH, CPU) == layer + 3 * products


def test_a_recurrent_layers_are_counted() -> None:
    """Five steps, four gates of six numbers, each of one input and six states."""
    forward = 5 * 2 * 4 * 6 * (1 + 6)
    flops = flops_per_row(objective(Recurrent()), BATCH, CPU)
    assert flops is not None
    assert 2 * forward <= flops <= 3 * forward


@pytest.mark.parametrize("model", [Failing(), Sum()], ids=["fails", "no matrices"])
def test_a_model_without_a_count_has_none(model: nn.Module) -> None:
    assert flops_per_row(objective(model), BATCH, CPU) is None


@pipeline.models.register("t_counting")
class Hooked(nn.Module):
    """Counts its calls in a hook, which a copy of it would share."""

    count: Tensor

    def __init__(self, inputs: dict[str, Field], outputs: dict[str, Output]) -> None:
        super().__init__()
        self.features, self.outputs = Features(inputs), Outputs(2, outputs)
        self.hidden = nn.Linear(self.features.width, 2)
        self.register_buffer("count", torch.zeros(()))

        def add(*_: object) -> None:
            self.count.add_(1)

        self.hidden.register_forward_hook(add)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        given: dict[str, Tensor] = self.outputs(self.hidden(self.features(batch)) / self.count)
        return given


def test_the_count_is_not_felt_by_a_model_whose_hooks_know_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"model": "t_counting", "training.epochs": 1}
    job = prepare(load(JOBS / "breast_cancer.yaml", changes), JOBS)
    curves = []
    for name in ("counted", "not counted"):
        run = RunDir(tmp_path / name)
        run.path.mkdir()
        train(job, run)
        curves.append(curve_sha256(list(Reader(run.journal).new())))
        monkeypatch.setattr(loop, "flops_per_row", lambda *_: None)
    assert curves[0] == curves[1]


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
