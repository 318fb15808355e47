"""Exported programs against the served model, by torch alone and by ONNX Runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import pipeline
from pipeline.errors import DataError, UsageError
from pipeline.launch.export import export
from pipeline.launch.initial import load_initial
from pipeline.models.parts import Features
from pipeline.spec import load
from tests.conftest import Command

NUM_ROWS = 120


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Numbers with gaps, vectors, texts, dates, lists of words and of numbers, times."""
    rng = np.random.default_rng(0)
    size = rng.lognormal(3, 1, NUM_ROWS)
    gaps = rng.normal(1e6, 5, NUM_ROWS)
    gaps[::7] = np.nan
    words = ["a", "b", "c", "d"]
    lengths = rng.integers(1, 6, NUM_ROWS)
    frame = pd.DataFrame({
        "size": size, "gaps": gaps, "vector": list(rng.normal(size=(NUM_ROWS, 3))),
        "city": rng.choice(["bern", "chur", "genf"], NUM_ROWS),
        "day": pd.Timestamp("2024-01-01") + pd.to_timedelta(rng.integers(0, 900, NUM_ROWS), "D"),
        "words": [rng.choice(words, length).tolist() for length in lengths],
        "years": rng.uniform(0.5, 2, NUM_ROWS),
        "price": 3 * size + rng.normal(size=NUM_ROWS), "sold": rng.random(NUM_ROWS) < 0.3,
        "kind": rng.choice(["x", "y", "z"], NUM_ROWS), "visits": rng.poisson(2, NUM_ROWS),
        "days": rng.exponential(100, NUM_ROWS),
    })  # fmt: skip
    path = tmp_path_factory.mktemp("exported") / "rows.parquet"
    frame.to_parquet(path)
    return path


def run(rows: Path, target: Any, loss: Any, model: Any = "mlp", **changes: Any) -> pipeline.Result:
    data = {
        "train": str(rows), "inputs": ["size", "gaps", "vector", "city", "day"], "target": target,
        "missing": {"gaps": "mean"}, "scale": {"size": "log"}, "dates": ["day"],
    }  # fmt: skip
    tree = {
        "name": "exported", "data": data, "model": model, "loss": loss,
        "training": {"epochs": 2}, "storage": str(rows.parent / "runs"),
    }  # fmt: skip
    return pipeline.run(tree, changes, fresh=True)


@pytest.mark.parametrize(
    ("target", "loss", "model", "changes"),
    [
        ("price", "mse", "mlp", {"data.target_scale": "log"}),
        (["price", "visits"], "huber", "linear",
         {"data.target_scale": {"price": "log", "visits": "robust"}}),
        ("price", {"name": "pinball", "levels": [0.1, 0.9]}, "mlp",
         {"training.precision": "float64"}),
        ("sold", "bce_with_logits", "mlp", {"training.threshold": 0.3}),
        ("kind", "cross_entropy", "mlp", {}),
        ("price", {"name": "mse", "label": "size"}, "mlp", {"training.precision": "bfloat16"}),
        ("kind", {"name": "ordinal", "class_order": ["x", "z", "y"]}, "mlp", {}),
        ("visits", "zero_inflated_poisson", "mlp", {"data.exposure": "years"}),
        (["days", "sold"], "cox", "mlp", {}),
        (["days", "sold"], {"name": "hazards", "times": [50, 1234567, 1234568]}, "mlp", {}),
        ("kind", "cross_entropy", {"name": "transformer", "width": 8, "num_heads": 2, "per": "row"},
         {"data.inputs": ["words"], "data.dates": [], "data.missing": "error",
          "data.scale": "standard"}),
    ],
    ids=str,
)  # fmt: skip
def test_programs_give_what_the_model_serves(
    target: Any, loss: Any, model: Any, changes: dict[str, Any], rows: Path, tmp_path: Path
) -> None:
    result = run(rows, target, loss, model, **changes)
    made = export(result.storage, tmp_path / "out", [str(rows)])
    about = json.loads((tmp_path / "out" / "columns.json").read_text())["outputs"]
    frame = pd.read_parquet(rows)
    served = set(result.model.predict(frame).columns)
    assert {column for output in about.values() for column in output["columns"]} == served
    if "hazards" in str(loss):
        assert served >= {"days_survival_1234567", "days_survival_1234568"}
    assert set(made.distances) == {"model.pt2", "model.onnx"}
    assert made.num_rows == NUM_ROWS
    assert max(made.distances.values()) < 1e-5


def test_a_program_is_used_without_this_code(rows: Path, tmp_path: Path) -> None:
    """As its documents say: raw numbers, codes by `values`, other numbers of rows."""
    columns = {"data.inputs": ["size", "gaps", "city"], "data.dates": []}
    result = run(rows, "sold", "bce_with_logits", **columns, **{"training.threshold": 0.3})
    export(result.storage, tmp_path)
    about = json.loads((tmp_path / "columns.json").read_text())
    frame = pd.read_parquet(rows)[["size", "gaps", "city"]].iloc[:17]
    frame.loc[3, "city"] = "unheard of"
    values = about["inputs"]["city"]["values"]
    given = {
        "size": frame["size"].to_numpy(), "gaps": frame["gaps"].to_numpy(),
        "city": np.array([values.index(c) + 1 if c in values else 0 for c in frame["city"]]),
    }  # fmt: skip
    served = result.model.predict(frame)["sold_probability_True"]
    program = torch.export.load(tmp_path / "model.pt2").module()
    tensors = {name: torch.from_numpy(values) for name, values in given.items()}
    np.testing.assert_allclose(program(tensors)["bce_with_logits"].detach(), served, rtol=1e-5)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    (found,) = session.run(["bce_with_logits"], given)
    np.testing.assert_allclose(found, served, rtol=1e-5)
    output = about["outputs"]["bce_with_logits"]
    assert output["threshold"] == pytest.approx(0.3)
    assert output["columns"] == ["sold", "sold_probability_True"]


def test_the_weights_start_another_run(rows: Path, tmp_path: Path) -> None:
    result = run(rows, "kind", "cross_entropy")
    export(result.storage, tmp_path)
    spec = load(Path(result.storage) / "spec.yaml", {"model.init_from": "model.safetensors"})
    _, initial = load_initial(spec, tmp_path)
    assert initial


class Counting(nn.Module):
    """Asks Python about its numbers, which no exporter can follow."""

    def __init__(self, inputs: Any) -> None:
        super().__init__()
        self.features = Features(inputs)
        self.layer = nn.Linear(self.features.width, 1)

    def forward(self, batch: Any) -> Tensor:
        features = self.features(batch)
        predicted: Tensor = self.layer(features)[:, 0]
        return predicted * 2 if float(features.detach().sum()) > 0 else predicted


@pipeline.models.register("t_asking")
def t_asking(inputs: Any) -> nn.Module:
    """A model that cannot be exported."""
    return Counting(inputs)


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(
    rows: Path, tmp_path: Path
) -> None:
    result = run(rows, "price", "mse", "t_asking")
    with pytest.raises(UsageError, match=r"model t_asking: torch\.export cannot follow it"):
        export(result.storage, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    pd.DataFrame({"other": [1.0]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(DataError, match="'size' is not among those given"):
        export(result.storage, tmp_path / "out", [str(tmp_path / "other.parquet")])


def test_the_command_says_how_far_programs_are_off(
    rows: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(rows, "kind", "cross_entropy")
    code, out, err = command("export", result.storage, rows, "--out", tmp_path / "out")
    assert code == 0, err
    assert "model.onnx  off by" in out
    assert "on 120 rows" in out
    monkeypatch.setenv("MLFLOW_TRACKING_URI", result.tracking_uri)
    code, _, err = command("export", result.model_uri, "--out", tmp_path / "out")
    assert code == 2
    assert "name files with rows" in err
