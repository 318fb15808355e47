"""An error of the user's own code is shown where it is in that code, and kept whole."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import mlflow
import pytest

from tests.conftest import Command, Write

OWN = """
import torch
from torch import nn
import pipeline
from pipeline.metrics import Metric


@pipeline.models.register("t_failing")
class Failing(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.layer, self.calls = nn.Linear(2, 1), 0

    def deeper(self, rows):
        raise ValueError("the model has had enough")

    def forward(self, batch):
        self.calls += self.training
        rows = torch.stack([batch["a"], batch["b"]], 1)
        if self.calls > 5:
            self.deeper(rows)
        return self.layer(rows).squeeze(1)


CALLS = []


@pipeline.losses.register("t_failing_loss")
def t_failing_loss(prediction, target):
    if prediction.requires_grad:
        CALLS.append(1)
    if len(CALLS) > 4:
        raise KeyError("the loss has had enough")
    return (prediction - target) ** 2


@pipeline.optimizers.register("t_failing_optimizer")
class FailingOptimizer(torch.optim.SGD):
    def step(self, closure=None):
        if len(self.state) or self.param_groups[0]["params"][0].grad is None:
            raise RuntimeError("never")
        CALLS.append(1)
        if len(CALLS) > 3:
            raise ZeroDivisionError("the optimizer has had enough")


@pipeline.metrics.register("t_failing_metric")
def t_failing_metric():
    def sums(prediction, truth):
        CALLS.extend([1] if len(prediction) else [])
        if len(CALLS) > 4:
            raise IndexError("the metric has had enough")
        return torch.zeros(1, dtype=torch.float64)

    return Metric(("values",), sums, float)
"""

Case = tuple[list[tuple[str, Any]], str, str]
CASES: dict[str, Case] = {
    "model": ([("model", "t_failing")], "ValueError: the model has had enough", "deeper"),
    "loss": ([("loss", "t_failing_loss")], "KeyError: 'the loss has had enough'", "t_failing_loss"),
    "optimizer": ([("optimizer", {"name": "t_failing_optimizer"})],
                  "ZeroDivisionError: the optimizer has had enough", "step"),
    "metric": ([("metrics", ["t_failing_metric"]), ("training.epochs", 5)],
               "IndexError: the metric has had enough", "sums"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("what", "num"),
    [
        *((what, 1) for what in CASES),
        pytest.param("model", 2, marks=pytest.mark.ray),
        *(pytest.param(what, 2, marks=pytest.mark.chaos) for what in CASES if what != "model"),
    ],
)
def test_the_users_own_line_is_named_and_the_traceback_is_kept(
    what: str, num: int, job: Write, command: Command, tmp_path: Path
) -> None:
    choice, expected, function = CASES[what]
    name = f"t_{what}_{num}"
    module = tmp_path / f"own_{name}.py"
    module.write_text(OWN.replace("t_failing", name))
    changes = {
        key: json.loads(json.dumps(value).replace("t_failing", name)) for key, value in choice
    }
    changes["workers.num"] = num
    code, _, err = command("run", job(changes), "--import", module)
    assert code in (1, 2), err
    assert expected in err
    assert re.search(rf"own_{name}\.py:\d+", err), err
    assert "whole traceback" in err
    assert what != "metric" or re.search(rf"in metric {name}_metric\n.*evaluation after step", err)
    assert f"runs/small-1/imports/own_{name}.py" not in err, "the copy is not what one edits"
    (run,) = (tmp_path / "runs").glob("small-*")
    first, *_ = sorted(run.glob("traceback-*.txt"))
    assert f"in {function}" in first.read_text().replace(name, "t_failing")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("small")
    assert experiment is not None
    (recorded,) = client.search_runs([experiment.experiment_id])
    names = {artifact.path for artifact in client.list_artifacts(recorded.info.run_id)}
    assert first.name in names


def test_the_same_command_resumes_a_failed_run_and_a_changed_one_starts_a_new_one(
    job: Write, command: Command, tmp_path: Path
) -> None:
    module = tmp_path / "own_again.py"
    module.write_text(OWN.replace("t_failing", "t_again"))
    path = job({"model": "t_again"})
    for _ in range(2):
        assert command("run", path, "--import", module)[0] == 1
    assert [run.name for run in (tmp_path / "runs").glob("small-*")] == ["small-1"]
    _, _, err = command("run", path, "--import", module, "--set", "optimizer.lr=0.02")
    assert "small-2" in err
