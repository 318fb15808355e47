"""From a file on disk to the first loss: equal to torch on the raw columns, worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pipeline
from pipeline.errors import DataError
from pipeline.spec import load
from pipeline.train.evaluate import evaluate
from pipeline.train.job import Job, prepare
from pipeline.train.term_metrics import choose_metrics

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 2)).astype(np.float32)
CPU = torch.device("cpu")


def job(folder: Path, columns: dict[str, Any], changes: dict[str, Any]) -> Job:
    pq.write_table(pa.table({"a": X[:, 0], "b": X[:, 1], **columns}), folder / "rows.parquet")
    data = {"train": str(folder / "rows.parquet"), "inputs": ["a", "b"], "scale": "none"}
    spec = {"name": "t", "model": "linear", **changes}
    return prepare(load(spec | {"data": data | changes["data"]}), folder)


def first_loss(made: Job) -> tuple[float, dict[str, Tensor]]:
    """Loss and predictions of all rows at the initial weights."""
    bound = made.objective()
    batch = made.train.gather(np.arange(made.num_rows))
    with torch.no_grad():
        numerators, denominators = bound(batch)[1], bound.denominators(batch)
        predictions = bound.predict(batch)
    return float((numerators / denominators).sum()), predictions


@pytest.mark.parametrize("ignore", [-1, 0, 2, 3, 7, -100])
@pytest.mark.parametrize("weighted", [False, True])
def test_an_ignored_label_is_left_out_wherever_it_stands(
    ignore: int, weighted: bool, tmp_path: Path
) -> None:
    labels = RNG.choice([0, 1, 2, 3, 7], 40)
    labels[:3] = ignore
    kept = [label for label in (0, 1, 2, 3, 7) if label != ignore]
    weight = [float(1 + i) for i in range(len(kept))]
    loss = {"name": "cross_entropy", "ignore_index": ignore}
    if weighted:
        loss["class_weight"] = {str(k): w for k, w in zip(kept, weight, strict=True)}
    made = job(tmp_path, {"y": labels}, {"loss": loss, "data": {"target": "y"}})
    got, predictions = first_loss(made)
    counted = labels != ignore
    codes = torch.tensor([kept.index(label) for label in labels[counted]])
    logits = predictions["prediction"][torch.from_numpy(counted)]
    assert logits.shape[1] == len(kept)
    tensor = torch.tensor(weight) if weighted else None
    assert got == pytest.approx(float(F.cross_entropy(logits, codes, tensor)), rel=1e-6)


@pytest.mark.parametrize("mean_over", ["weights", "items"])
def test_a_column_of_row_weights_is_numpys_weighted_average(mean_over: str, tmp_path: Path) -> None:
    y, weight = RNG.normal(size=40), RNG.uniform(0, 3, 40)
    data = {"target": "y", "sample_weight": {"column": "w", "mean_over": mean_over}}
    made = job(tmp_path, {"y": y, "w": weight}, {"loss": "mse", "data": data})
    assert [field.name for field in made.fields if field.is_input] == ["a", "b"]
    got, predictions = first_loss(made)
    errors = (predictions["prediction"].numpy() - y) ** 2
    wanted = np.average(errors, weights=weight)
    if mean_over == "items":
        wanted = (errors * weight).mean()
    assert got == pytest.approx(wanted, rel=1e-6)


def test_negative_row_weights_are_refused_with_their_row(tmp_path: Path) -> None:
    weight = np.ones(40)
    weight[7] = -0.5
    data = {"target": "y", "sample_weight": "w"}
    with pytest.raises(DataError, match=r"column 'w' holds -0.5, .*first at row 7"):
        job(tmp_path, {"y": X[:, 0], "w": weight}, {"loss": "mse", "data": data})


def test_lists_of_labels_are_padded_and_ignored_as_torch_does(tmp_path: Path) -> None:
    tokens = [[1, 2, 0, 3], [2], [0, 0, 1]] * 10
    targets = [[0, 2, 0, 3], [1], [0, 3, 1]] * 10
    pq.write_table(pa.table({"x": tokens, "y": targets}), tmp_path / "rows.parquet")
    spec = {
        "name": "t", "data": {"train": str(tmp_path / "rows.parquet"), "target": "y"},
        "model": {"name": "transformer", "width": 8, "num_layers": 1, "dropout": 0.0},
        "loss": {"name": "cross_entropy", "ignore_index": 0},
    }  # fmt: skip
    got, predictions = first_loss(prepare(load(spec), tmp_path))
    padded = torch.tensor([row + [0] * (4 - len(row)) for row in targets])
    expected = F.cross_entropy(predictions["prediction"], padded, ignore_index=0)
    assert got == pytest.approx(float(expected), rel=1e-6)


def test_targets_beside_each_other_are_one_loss_and_metrics_are_their_mean(tmp_path: Path) -> None:
    from sklearn.metrics import r2_score, root_mean_squared_error

    price, rooms = RNG.normal(1e5, 2e4, 40), RNG.normal(3, 1, 40)
    made = job(
        tmp_path, {"price": price, "rooms": rooms},
        {"loss": "mse", "data": {"target": ["price", "rooms"], "target_scale": "standard"}},
    )  # fmt: skip
    bound = made.objective()
    metrics = choose_metrics(bound.terms, ["r2", "rmse"])
    found = evaluate(bound, made.train, np.arange(40), 7, metrics, CPU).values
    with torch.no_grad():
        raw = bound.predict(made.train.gather(np.arange(40)))["prediction"].double().numpy()
    truth = np.stack([price, rooms], 1)
    served = raw * truth.std(0) + truth.mean(0)
    assert found["r2"] == pytest.approx(r2_score(truth, served), rel=1e-5)
    assert found["rmse"] == pytest.approx(root_mean_squared_error(truth, served), rel=1e-5)


def test_r2_of_large_amounts_with_a_small_spread_does_not_cancel(tmp_path: Path) -> None:
    time = 1.7e9 + RNG.normal(0, 60, 40)
    made = job(
        tmp_path, {"y": time}, {"loss": "mse", "data": {"target": "y", "target_scale": "standard"}}
    )
    bound = made.objective()
    for parameter in bound.parameters():
        parameter.data.zero_()  # predicts the mean
    metrics = choose_metrics(bound.terms, ["r2"])
    found = evaluate(bound, made.train, np.arange(40), 8, metrics, CPU).values
    assert found["r2"] == pytest.approx(0, abs=1e-4)


def test_validation_without_any_item_has_no_loss(tmp_path: Path) -> None:
    labels = np.array([0, 1] * 15 + [-100] * 10)
    loss = {"name": "cross_entropy"}
    made = job(tmp_path, {"y": labels}, {"loss": loss, "data": {"target": "y"}})
    bound = made.objective()
    metrics = choose_metrics(bound.terms, None)
    found = evaluate(bound, made.train, np.arange(30, 40), 4, metrics, CPU).values
    assert found["loss"] is None


@pytest.mark.parametrize("size", [1e-13, 1e12])
def test_scaling_keeps_columns_of_any_size(size: float, tmp_path: Path) -> None:
    y = {"y": X[:, 0].astype(float)}
    made = job(
        tmp_path, {"small": X[:, 1].astype(float) * size, **y},
        {"loss": "mse", "data": {"target": "y", "inputs": ["small"], "scale": "standard"}},
    )  # fmt: skip
    column = made.train.gather(np.arange(40))["small"]
    assert isinstance(column, Tensor)
    assert float(column.std()) == pytest.approx(1, rel=0.05)


def test_only_amounts_are_scaled_among_the_targets(tmp_path: Path) -> None:
    made = job(
        tmp_path, {"count": RNG.poisson(3, 40), "price": RNG.normal(100, 9, 40)},
        {"loss": [{"name": "poisson_nll", "target": "count", "prediction": "c"},
                  {"name": "mse", "target": "price", "prediction": "p"}],
         "data": {"target": ["count", "price"], "target_scale": "standard"}},
    )  # fmt: skip
    batch = made.train.gather(np.arange(40))
    count, price = batch["count"], batch["price"]
    assert isinstance(count, Tensor)
    assert isinstance(price, Tensor)
    assert float(count.min()) >= 0
    assert float(price.mean()) == pytest.approx(0, abs=1e-5)


def test_a_model_sees_its_inputs_and_nothing_of_the_target(tmp_path: Path) -> None:
    made = job(tmp_path, {"y": X[:, 0]}, {"loss": "mse", "data": {"target": "y"}})
    bound = made.objective()
    seen: list[set[str]] = []

    class Watching(torch.nn.Module):
        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            seen.append(set(batch))
            return batch["a"]

    bound.model = Watching()
    bound.heads["0"] = torch.nn.Linear(1, 1)
    bound.predict(made.train.gather(np.arange(3)))
    assert seen == [{"a", "b"}]


def test_each_target_of_a_shared_loss_is_served_under_its_own_name(tmp_path: Path) -> None:
    table = pa.table({"a": X[:, 0], "b": X[:, 1], "up": X[:, 0] > 0, "high": X[:, 1] > 0})
    pq.write_table(table, tmp_path / "rows.parquet")
    spec = {
        "name": "t", "model": "linear", "loss": "bce_with_logits", "storage": str(tmp_path),
        "data": {"train": str(tmp_path / "rows.parquet"), "target": ["up", "high"]},
        "optimizer": {"name": "adam", "lr": 0.1}, "training": {"epochs": 60},
    }  # fmt: skip
    model = pipeline.run(spec).model
    frame = pd.DataFrame({"a": X[:, 0], "b": X[:, 1]})
    predicted = model.predict(frame)
    assert set(predicted.columns) == {
        "up", "up_probability_True", "high", "high_probability_True"
    }  # fmt: skip
    assert (predicted["high"] == (X[:, 1] > 0)).mean() > 0.9
    assert len(model.predict(frame.iloc[:0])) == 0
