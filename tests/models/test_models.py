"""The built-in models learn what they are for, from tables as users have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import pipeline
from pipeline.data.batch import Ragged
from pipeline.data.columns import Tokens
from pipeline.losses.bind import Output
from pipeline.models.transformer import Transformer


def run(folder: Path, table: pa.Table, spec: dict[str, Any]) -> pipeline.Result:
    pq.write_table(table, folder / "rows.parquet")
    data = {"train": str(folder / "rows.parquet"), **spec.pop("data")}
    return pipeline.run({"name": "t", "data": data, "storage": str(folder), **spec})


def metric(result: pipeline.Result, name: str) -> float:
    value = result.metrics[name]
    assert value is not None
    return value


@pytest.mark.processes
def test_mlp_learns_from_categories_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    city = rng.choice(["oslo", "rome", "lima"], 300)
    price = np.select([city == "oslo", city == "rome"], [1.0, 5.0], 9.0)
    price += rng.normal(0, 0.01, 300)  # equal rows would all be held out together
    table = pa.table({"city": city, "day": rng.integers(0, 7, 300), "price": price})
    result = run(tmp_path, table, {
        "data": {"target": "price", "validation": 0.2, "categorical": ["day"]},
        "model": {"name": "mlp", "hidden": [16]}, "loss": "mse",
        "optimizer": {"name": "adam", "lr": 0.02}, "training": {"epochs": 30},
    })  # fmt: skip
    assert metric(result, "r2") > 0.95


@pytest.mark.processes
def test_transformer_learns_the_next_token(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    starts, lengths = rng.integers(0, 5, 200), rng.integers(1, 9, 200)
    tokens = [[(s + i) % 5 for i in range(n)] for s, n in zip(starts, lengths, strict=True)]
    result = run(tmp_path, pa.table({"tokens": tokens}), {
        "data": {"inputs": ["tokens"], "target": "next", "shift": {"next": "tokens"},
                 "validation": 0.2},
        "model": {"name": "transformer", "width": 32, "num_layers": 1},
        "loss": "cross_entropy", "optimizer": {"name": "adamw", "lr": 0.01},
        "training": {"epochs": 15},
    })  # fmt: skip
    assert metric(result, "accuracy") > 0.95


@pytest.mark.processes
def test_transformer_classifies_rows_of_text_tokens(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    words = [list(rng.choice(["good", "bad", "film", "the"], n)) for n in rng.integers(1, 8, 400)]
    kind = ["praise" if row.count("good") > row.count("bad") else "other" for row in words]
    result = run(tmp_path, pa.table({"words": words, "kind": kind}), {
        "data": {"target": "kind", "validation": 0.2},
        "model": {"name": "transformer", "width": 32, "num_layers": 1, "per": "row"},
        "loss": "cross_entropy", "optimizer": {"name": "adamw", "lr": 0.01},
        "training": {"epochs": 15},
    })  # fmt: skip
    assert metric(result, "accuracy") > 0.9


@pytest.mark.processes
def test_a_mean_with_its_variance_is_learned(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, 500)
    y = 3 * x + rng.normal(0, 0.1, 500)
    result = run(tmp_path, pa.table({"x": x, "y": y}), {
        "data": {"target": "y", "validation": 0.2}, "model": {"name": "mlp", "hidden": [16]},
        "loss": "gaussian_nll", "optimizer": {"name": "adam", "lr": 0.01},
        "training": {"epochs": 20},
    })  # fmt: skip
    assert metric(result, "r2") > 0.9


@pytest.mark.processes
def test_two_labels_at_once_are_learned_with_balanced_weights(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1000, 2))
    table = pa.table({"a": x[:, 0], "b": x[:, 1], "up": x[:, 0] > 0, "rare": x[:, 1] > 1.2})
    result = run(tmp_path, table, {
        "data": {"target": ["up", "rare"], "validation": 0.2}, "model": "linear",
        "loss": [{"name": "bce_with_logits", "target": "up", "prediction": "u", "label": "up"},
                 {"name": "bce_with_logits", "target": "rare", "prediction": "r",
                  "pos_weight": "balanced", "label": "rare"}],
        "optimizer": {"name": "adam", "lr": 0.05}, "training": {"epochs": 100},
    })  # fmt: skip
    assert metric(result, "up/accuracy") > 0.95
    assert metric(result, "rare/f1") > 0.8


@pytest.mark.processes
@pytest.mark.parametrize(
    ("precision", "schedule"),
    [
        ("float32", "cosine"),
        ("bfloat16", "inverse_sqrt"),
        ("float32", {"name": "step", "every_steps": 5}),
    ],
)
def test_precision_and_schedules_train(precision: str, schedule: Any, tmp_path: Path) -> None:
    x = np.linspace(-1, 1, 100)
    spec = {
        "data": {"target": "y", "validation": 0.2}, "model": "linear", "loss": "huber",
        "optimizer": {"name": "sgd", "lr": 0.1}, "schedule": schedule,
        "training": {"epochs": 3, "precision": precision, "clip_norm": 1.0},
    }  # fmt: skip
    result = run(tmp_path, pa.table({"x": x, "y": 2 * x}), spec)
    validation = [p["validation"]["loss"] for p in result.curve if "validation" in p]
    first, last = validation[0], validation[-1]
    assert first is not None
    assert last is not None
    assert last < first


def test_padding_does_not_change_what_a_transformer_says() -> None:
    tokens = Tokens("t", "list<int64>", num_classes=9)
    for per in ("token", "row"):
        torch.manual_seed(0)
        model = Transformer(
            {"t": tokens}, {"prediction": Output("prediction", 4, "identity")}, width=16,
            num_layers=2, num_heads=2, dropout=0.0, max_length=32, per=per,
        ).double().eval()  # fmt: skip
        short = Ragged(torch.tensor([[3, 5, 7]]), torch.tensor([3]))
        padded = Ragged(torch.tensor([[3, 5, 7, 1, 2]]), torch.tensor([3]))
        one, two = model({"t": short})["prediction"], model({"t": padded})["prediction"]
        torch.testing.assert_close(one, two[..., :3] if per == "token" else two)


def test_a_causal_transformer_does_not_see_the_future() -> None:
    tokens = Tokens("t", "list<int64>", num_classes=9)
    torch.manual_seed(0)
    model = Transformer(
        {"t": tokens}, {"prediction": Output("prediction", 4, "identity")}, width=16,
        num_layers=2, num_heads=2, dropout=0.0, max_length=32, per="token",
    ).eval()  # fmt: skip
    lengths = torch.tensor([4])
    one = model({"t": Ragged(torch.tensor([[3, 5, 7, 1]]), lengths)})["prediction"]
    two = model({"t": Ragged(torch.tensor([[3, 5, 7, 8]]), lengths)})["prediction"]
    torch.testing.assert_close(one[..., :3], two[..., :3])
    assert not torch.equal(one[..., 3], two[..., 3])
