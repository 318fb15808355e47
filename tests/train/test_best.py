"""`training.best_by`: the best evaluation's weights become the model, whatever is killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch

import pipeline
from pipeline.errors import SpecError, UsageError
from pipeline.rundir import RunDir, checkpoint, records
from pipeline.train.weights import load_weights, weights_sha256
from tests.conftest import JOBS

OVERRIDES = {
    "training.epochs": 12, "training.microbatch_size": 16, "optimizer": {"name": "adam", "lr": 0.2},
    "checkpoint": {"every_steps": 11, "keep": 99},
}  # fmt: skip


def trained(folder: Path, name: str | None) -> pipeline.Result:
    more: dict[str, Any] = {"storage": str(folder), "training.best_by": name}
    return pipeline.run(JOBS / "diabetes.yaml", OVERRIDES | more)


@pytest.mark.processes
@pytest.mark.parametrize(("name", "choose"), [("rmse", min), ("r2", max), ("loss", min)])
def test_the_weights_are_those_of_the_best_evaluation(
    tmp_path: Path, name: str, choose: Any
) -> None:
    result = trained(tmp_path, name)
    found = {p["step"]: p["validation"][name] for p in result.curve if "validation" in p}
    del found[0]  # nothing was trained yet
    step = choose(found, key=found.__getitem__)
    metrics = next(p["validation"] for p in result.curve if p["step"] == step and "validation" in p)
    assert result.best == {"metric": name, "step": step, "value": found[step], "metrics": metrics}
    assert step < result.steps, "else it shows nothing"
    at_best = checkpoint.load(RunDir(Path(result.storage)), step)["weights"]
    assert result.weights_sha256 == weights_sha256(at_best)
    assert result.weights_sha256 == weights_sha256(load_weights(Path(result.storage, "weights.pt")))
    last = checkpoint.load(RunDir(Path(result.storage)), result.steps)
    assert weights_sha256(last["weights"]) != result.weights_sha256
    client = mlflow.MlflowClient(result.tracking_uri)
    run = client.get_run(result.run_id)
    assert {key: run.data.metrics[f"best/{key}"] for key in metrics} == metrics
    (output,) = run.outputs.model_outputs
    of_model = {m.key: m.value for m in client.get_logged_model(output.model_id).metrics or []}
    assert of_model[f"validation/{name}"] == found[step], "what MLflow shows beside the model"


@pytest.mark.processes
def test_keeping_the_best_weights_changes_no_step(tmp_path: Path) -> None:
    one, other = trained(tmp_path / "one", "rmse"), trained(tmp_path / "other", None)
    assert one.curve_sha256 == other.curve_sha256
    assert other.best is None
    last = checkpoint.load(RunDir(Path(one.storage)), one.steps)["weights"]
    assert weights_sha256(last) == other.weights_sha256


@pytest.mark.processes
def test_an_invalid_metric_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no metric 'rsme'.*did you mean 'rmse'"):
        trained(tmp_path, "rsme")
    with pytest.raises(SpecError, match=r"training\.best_by: needs rows"):
        pipeline.run(JOBS / "linear.yaml", {"training.best_by": "rmse", "data.validation": None})


def test_a_missing_or_infinite_value_is_never_the_best() -> None:
    from pipeline.train.best import BestWeights

    model = torch.nn.Linear(1, 1)
    best = BestWeights("loss", [], [])
    values = [0.1, None, float("nan"), float("-inf"), 2.0, 2.0, 3.0]
    for number, value in enumerate(values):
        best.update(3 * number, {"loss": value}, model)
    assert best.result == records.Best(metric="loss", step=12, value=2.0, metrics={"loss": 2.0})
    assert best.state is not None
    before = best.state["weights"]["weight"].clone()
    with torch.no_grad():
        model.weight.add_(1)
    assert torch.equal(best.state["weights"]["weight"], before), "a copy"
