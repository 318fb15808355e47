"""Evaluation during training: it changes nothing of what is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from pipeline import registry
from pipeline.rundir import RunDir
from pipeline.rundir.journal import Reader, curve_sha256
from pipeline.spec import load
from pipeline.train.job import prepare
from pipeline.train.loop import train


class Frozen(nn.Module):
    """Its constructor leaves the BatchNorm in evaluation for good, as after pre-training."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1).eval()
        self.layer = nn.Linear(1, 1)

    def forward(self, batch: Any) -> Tensor:
        output: Tensor = self.layer(self.norm(batch["x"][:, None]))
        return output.squeeze(1)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    x = np.random.default_rng(0).normal(size=60)
    for name, part in (("train", x[:40]), ("held", x[40:])):
        pq.write_table(pa.table({"x": part, "y": 3 * part}), tmp_path / f"{name}.parquet")
    return tmp_path


def curve(rows: Path, name: str, validation: str | None) -> str:
    if "t_frozen" not in registry.models.entries:
        registry.models.register("t_frozen")(Frozen)
    run = RunDir(rows / name)
    run.path.mkdir()
    spec = {
        "name": "t", "model": "t_frozen", "loss": "mse",
        "data": {"train": "train.parquet", "target": "y", "validation": validation},
        "training": {"epochs": 4, "batch_size": 10, "microbatch_size": 5},
    }  # fmt: skip
    train(prepare(load(spec), rows), run)
    return curve_sha256(list(Reader(run.journal).new()))


def test_modules_left_in_evaluation_stay_there_after_one(rows: Path) -> None:
    """Else the curve would depend on when it is evaluated, and on where a run is resumed."""
    assert curve(rows, "with", "held.parquet") == curve(rows, "without", None)


def test_a_frozen_norm_keeps_its_statistics(rows: Path) -> None:
    curve(rows, "run", "held.parquet")
    weights = torch.load(rows / "run" / "weights.pt", weights_only=True)
    assert weights["model.norm.running_mean"].item() == 0.0
    assert weights["model.norm.num_batches_tracked"].item() == 0
