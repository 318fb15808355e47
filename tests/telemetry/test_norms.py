"""Norms of parameters and gradients: torch's own, recorded on request, and no part of the curve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from torch import nn

import pipeline
from pipeline.telemetry.norms import parameter_norms
from tests.conftest import JOBS


def test_they_are_torchs() -> None:
    module: Any = nn.Sequential(nn.Linear(3, 2), nn.Embedding(5, 4, sparse=True))
    module[0].bias.requires_grad_(False)
    (module[0](torch.ones(2, 3)).sum() + module[1](torch.tensor([1, 1])).sum()).backward()
    norms = parameter_norms(module)
    gradient: Any = module[1].weight.grad
    assert norms == pytest.approx({
        "weight/0.weight": float(module[0].weight.norm()),
        "gradient/0.weight": 2 * 6**0.5,
        "weight/1.weight": float(module[1].weight.norm()),
        "gradient/1.weight": float(gradient.to_dense().norm()),
    })  # fmt: skip
    assert parameter_norms(nn.Identity()) == {}


@pytest.mark.processes
def test_mlflow_has_them_where_they_are_asked_for(tmp_path: Path) -> None:
    changes = {"storage": str(tmp_path), "training.epochs": 2, "training.clip_norm": 0.1}
    plain = pipeline.run(JOBS / "diabetes.yaml", changes)
    asked = {**changes, "tracking.norms_every": {"steps": 5}}
    result = pipeline.run(JOBS / "diabetes.yaml", asked, fresh=True)
    assert result.curve_sha256 == plain.curve_sha256
    client = mlflow.MlflowClient(result.tracking_uri)
    names = [key for key in client.get_run(result.run_id).data.metrics if "norms/" in key]
    assert len(names) == 8  # two layers with a bias each
    steps = list(range(5, result.steps + 1, 5))
    squares = [0.0] * len(steps)
    for name in names:
        history = client.get_metric_history(result.run_id, name)
        assert [one.step for one in history] == steps
        if name.startswith("norms/gradient/"):
            squares = [s + one.value**2 for s, one in zip(squares, history, strict=True)]
    assert [s**0.5 for s in squares] == pytest.approx([0.1] * len(steps), rel=1e-3)  # clipped
