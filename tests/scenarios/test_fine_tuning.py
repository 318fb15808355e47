"""Fine-tuning whole: against plain torch, on any workers, after a kill, and as it is served."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.optim import swa_utils

import pipeline
from pipeline.errors import UsageError
from pipeline.launch.initial import load_initial
from pipeline.models.parts import Features
from pipeline.rundir import RunDir
from pipeline.rundir.journal import Reader
from pipeline.spec import load
from pipeline.train.job import Job, prepare
from pipeline.train.loop import train
from pipeline.train.weights import load_weights
from tests.killed import assert_same_bits

NUM_ROWS = 90
LORA = {"match": "encoder.0", "rank": 2, "alpha": 8}
TUNED = {
    "model.freeze": ["encoder"],
    "model.lora": LORA,
    "optimizer": {"name": "adamw", "lr": 0.05, "groups": [
        {"match": "biases_and_norms", "weight_decay": 0}, {"match": "head", "lr": 0.02}]},
    "training.average": {"ema": 0.8},
}  # fmt: skip


class Encoded(nn.Module):
    """An encoder with running statistics, and a head."""

    def __init__(self, inputs: Any, outputs: Any) -> None:
        super().__init__()
        self.features = Features(inputs)
        width = self.features.width
        self.encoder = nn.Sequential(nn.Linear(width, 6), nn.BatchNorm1d(6), nn.Tanh())
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 1)

    def forward(self, batch: Any) -> torch.Tensor:
        predicted: torch.Tensor = self.head(self.norm(self.encoder(self.features(batch))))
        return predicted[:, 0]


@pipeline.models.register("t_encoded")
def t_encoded(inputs: Any, outputs: Any) -> nn.Module:
    """A model to tune."""
    return Encoded(inputs, outputs)


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    a, b, c = rng.normal(size=(3, NUM_ROWS))
    frame = pd.DataFrame({"a": a, "b": b, "c": c, "y": np.tanh(a - b) + 0.3 * c + 2})
    frame.to_parquet(tmp_path / "rows.parquet")
    start = {name: tensor + 0.1 for name, tensor in _fresh(tmp_path).items()
             if tensor.is_floating_point()}  # fmt: skip
    save_file({**_fresh(tmp_path), **start}, tmp_path / "start.safetensors")
    return {
        "name": "tuned", "loss": "mse", "model": {"name": "t_encoded"},
        "data": {"train": str(tmp_path / "rows.parquet"), "target": "y", "validation": 0.2,
                 "test": 0.2},
        "training": {"epochs": 4, "batch_size": 12, "microbatch_size": 4, "best_by": "rmse"},
        "checkpoint": {"every_steps": 3}, "storage": str(tmp_path / "runs"),
    }  # fmt: skip


def _fresh(folder: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    data = {"train": str(folder / "rows.parquet"), "target": "y"}
    spec = load({"name": "fresh", "loss": "mse", "model": "t_encoded", "data": data})
    return prepare(spec, folder).objective().model.state_dict()


def job_of(tree: dict[str, Any], changes: dict[str, Any], folder: Path) -> Job:
    spec, initial = load_initial(load(tree, changes), folder)
    return prepare(spec, folder, initial=initial)


def tuned(tree: dict[str, Any], folder: Path) -> Job:
    return job_of(tree, {**TUNED, "model.init_from": "start.safetensors"}, folder)


def test_it_is_what_a_plain_torch_loop_does(tree: dict[str, Any], tmp_path: Path) -> None:
    """One micro-batch a step, no drawing: torch's groups, averaged model, and factors by hand."""
    whole = {"training.microbatch_size": None, "training.best_by": None}
    changes = {**TUNED, **whole, "model.init_from": "start.safetensors"}
    job = job_of(tree, changes, tmp_path)
    (tmp_path / "run").mkdir()
    train(job, RunDir(tmp_path / "run"))

    torch.manual_seed(0)
    inputs = {field.name: field for field in job.fields if field.is_input}
    model: Any = Encoded(inputs, None)
    start = load_initial(load(tree, changes), tmp_path)[1]
    assert start is not None
    model.load_state_dict(start)
    model.encoder.requires_grad_(False)
    model.encoder[1].eval()
    a, b = nn.Parameter(torch.empty(2, 3)), nn.Parameter(torch.zeros(6, 2))
    objective = job.objective().state_dict()
    with torch.no_grad():  # drawn from the seed
        a.copy_(objective["model.encoder.0.parametrizations.weight.0.lora_a"])

    def predict(batch: Any) -> Any:
        rows = model.features(batch)
        weight = model.encoder[0].weight + 4.0 * b @ a
        hidden = model.encoder[2](model.encoder[1](F.linear(rows, weight, model.encoder[0].bias)))
        return model.head(model.norm(hidden))[:, 0]

    groups: list[dict[str, Any]] = [
        {"params": [a, b]},
        {"params": [model.norm.weight, model.norm.bias, model.head.bias], "weight_decay": 0.0},
        {"params": [model.head.weight], "lr": 0.02},
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=0.05)
    holder = nn.ModuleDict({"model": model})
    holder.register_parameter("a", a)
    holder.register_parameter("b", b)
    ema = swa_utils.get_ema_multi_avg_fn(0.8)  # type: ignore[no-untyped-call]
    average = swa_utils.AveragedModel(holder, multi_avg_fn=ema, use_buffers=True)
    losses = []
    for step in range(job.num_steps):
        batch: Any = job.train.gather(job.sampler().rows(step))
        loss = F.mse_loss(predict(batch), batch["y"])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        average.update_parameters(holder)
        losses.append(loss.item())

    points = list(Reader(tmp_path / "run" / "curve.jsonl").new())
    assert [p["train"]["loss"] for p in points if "train" in p] == pytest.approx(losses, rel=1e-4)
    weights = load_weights(tmp_path / "run" / "weights.pt")
    averaged: Any = average.module
    product = averaged["model"].encoder[0].weight + 4.0 * averaged.b @ averaged.a
    expected = {**model.state_dict(), **averaged["model"].state_dict()}
    expected["encoder.0.weight"] = product
    expected["norm.num_batches_tracked"] = model.norm.num_batches_tracked  # a count is none
    assert weights.keys() == {f"model.{name}" for name in expected}
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[f"model.{name}"], tensor, rtol=1e-4, atol=1e-5)


def test_on_any_workers_and_after_a_kill_it_has_the_same_bits(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    assert_same_bits(partial(tuned, tree, tmp_path), tmp_path, [8, 14])


def test_a_run_starts_from_a_run_and_from_what_mlflow_has_of_it(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    first = pipeline.run(tree, {**TUNED, "tracking.register_as": "tuned"})
    frame = pd.read_parquet(tmp_path / "rows.parquet")[["a", "b", "c"]]
    model_id = mlflow.MlflowClient(first.tracking_uri).search_logged_models(
        [mlflow.MlflowClient(first.tracking_uri).get_run(first.run_id).info.experiment_id]
    )[0].model_id  # fmt: skip
    sources = (
        first.storage, "tuned-1", "models:/tuned@candidate", f"models:/{model_id}",
        f"runs:/{first.run_id}/model",
    )  # fmt: skip
    hashes = set()
    for source in sources:
        init_from = load_initial(load(tree, {"model.init_from": source}), tmp_path)[
            0
        ].model.init_from
        assert init_from is not None
        hashes.add(init_from.sha256)
    assert len(hashes) == 1

    changes = {
        "name": "next", "model.init_from": first.storage, "model.freeze": ["encoder", "norm"],
        "training.max_steps": 1, "training.best_by": None, "workers.num": 2,
        "optimizer": {"name": "sgd", "lr": 1e-12},
    }  # fmt: skip
    result = pipeline.run(tree, changes)
    wanted = first.model.predict(frame)["y"]
    np.testing.assert_allclose(result.model.predict(frame)["y"], wanted, rtol=1e-5)
    params = mlflow.MlflowClient(result.tracking_uri).get_run(result.run_id).data.params
    assert params["model.init_from.weights"] == first.storage
    assert params["model.init_from.sha256"] in hashes


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "nowhere is not there; looked for "),
        ("rows.parquet", "neither the folder of a run nor a .safetensors file"),
        (".", r"not the folder of a run \(no record.json\)"),
        ("broken.safetensors", "cannot be read"),
        ("models:/nothing@champion", "is no model in sqlite"),
        ({"weights": "start.safetensors", "sha256": "0" * 64}, "has the SHA-256 [0-9a-f]{64}, not"),
    ],
)
def test_a_source_that_is_none_is_refused(
    source: Any, message: str, tree: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"12345678901234567890")
    with pytest.raises(UsageError, match=message):
        job_of(tree, {"model.init_from": source}, tmp_path)


def test_other_weights_are_another_job(tree: dict[str, Any], tmp_path: Path) -> None:
    digests = []
    for shift in (0, 1):
        weights = {name: tensor + shift for name, tensor in _fresh(tmp_path).items()}
        save_file(weights, tmp_path / "start.safetensors")
        job = job_of(tree, {"model.init_from": "start.safetensors"}, tmp_path)
        digests.append(job.spec.digest)
    assert digests[0] != digests[1]
