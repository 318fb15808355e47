"""Model and losses out of the registries: they start from the spec's seed and from nothing else."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline import registry
from pipeline.rundir import RunDir
from pipeline.rundir.journal import Reader, curve_sha256
from pipeline.rundir.records import Done
from pipeline.spec import load
from pipeline.train.job import prepare
from pipeline.train.loop import train
from tests.processes import on_workers


class LearnedDistance(nn.Module):
    """A loss with weights of its own, which start at random and are trained with the model."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 4)

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        distances: Tensor = self.layer((prediction - target)[:, None])
        return distances.square().mean(1) + 0.1


SPEC: dict[str, Any] = {
    "name": "t", "model": {"name": "mlp", "hidden": [4]}, "loss": "t_learned_distance",
    "data": {"train": "sample:diabetes", "target": "progression", "target_scale": "standard"},
    "training": {"epochs": 2, "batch_size": 64, "microbatch_size": 16},
}  # fmt: skip


def trained(rank: int, num: int) -> tuple[str, str]:
    """Curve and weights; each worker has drawn other random numbers before."""
    if "t_learned_distance" not in registry.losses.entries:
        registry.losses.register("t_learned_distance", per="row")(LearnedDistance)
    torch.manual_seed(rank + 10 * num)
    with tempfile.TemporaryDirectory() as place:
        run = RunDir(Path(place))
        train(prepare(load(SPEC), Path()), run)
        if rank:
            return "", ""
        return curve_sha256(list(Reader(run.journal).new())), Done.read(run.done).weights_sha256


@pytest.mark.processes
def test_a_loss_with_random_weights_of_its_own_starts_alike_on_every_worker() -> None:
    alone, together = (on_workers(num, trained)[0] for num in (1, 3))
    assert alone == together
