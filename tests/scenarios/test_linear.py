"""`jobs/linear.yaml` against ten lines of plain torch, on one, two and three workers."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

import pipeline
from pipeline.train.build import build_objective
from pipeline.train.job import prepare
from pipeline.train.weights import load_weights
from tests.conftest import JOBS

LINEAR = JOBS / "linear.yaml"
pytestmark = pytest.mark.usefixtures("cluster")


@cache
def plain_losses() -> tuple[list[float], dict[str, float]]:
    """A loop anyone would write, from the weights that the job starts with."""
    spec = pipeline.load(LINEAR)
    start = build_objective(spec, prepare(spec, JOBS).fields).model.state_dict()
    model = torch.nn.Linear(1, 1)
    model.weight.data, model.bias.data = (v.clone() for v in start.values())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[2.0], [4.0], [6.0]])
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, {"weight": float(model.weight.detach()), "bias": float(model.bias.detach())}


@pytest.mark.ray
@pytest.mark.parametrize("num_workers", [1, pytest.param(2, marks=pytest.mark.chaos), 3])
def test_all_100_losses_are_those_of_a_plain_loop(num_workers: int, tmp_path: Path) -> None:
    overrides = {"workers.num": num_workers, "storage": str(tmp_path)}
    result = pipeline.run(LINEAR, overrides)
    losses, weights = plain_losses()
    assert result.steps == len(result.losses) == 100
    assert result.losses == pytest.approx(losses, rel=1e-6)
    trained = load_weights(Path(result.storage) / "weights.pt")
    assert [float(v) for v in trained.values()] == pytest.approx(list(weights.values()), rel=1e-6)


@pytest.mark.chaos
def test_more_workers_than_rows_and_micro_batches_train_the_same_curve(tmp_path: Path) -> None:
    overrides = {"workers.num": 4, "training.microbatch_size": 2, "storage": str(tmp_path)}
    result = pipeline.run(LINEAR, overrides)
    assert result.losses == pytest.approx(plain_losses()[0], rel=1e-6)


@pytest.mark.ray
def test_with_micro_batches_the_bits_are_the_same_on_one_and_three_workers(
    tmp_path: Path,
) -> None:
    overrides = {
        "training.microbatch_size": 8, "training.epochs": 2, "model.dropout": 0.2,
        "storage": str(tmp_path),
    }  # fmt: skip
    job = JOBS / "digits.yaml"
    one, three = (pipeline.run(job, overrides | {"workers.num": n}, fresh=True) for n in (1, 3))
    assert one.curve_sha256 == three.curve_sha256
    assert one.weights_sha256 == three.weights_sha256
    assert one.metrics == three.metrics
