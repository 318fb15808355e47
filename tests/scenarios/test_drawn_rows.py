"""Rows that are drawn more often than others, and counts that grow with an exposure."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import PoissonRegressor

import pipeline
from pipeline.data.sampler import WeightedSampler
from pipeline.errors import DataError, PipelineError, SpecError
from pipeline.launch.run import check
from pipeline.rundir import RunDir
from pipeline.rundir.journal import Reader
from pipeline.train.loop import train
from tests.conftest import merged
from tests.killed import assert_same_bits, job_of

NUM_ROWS = 150
RARE = 0.1


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    years = rng.uniform(0.2, 3, NUM_ROWS)
    a, b = rng.normal(size=(2, NUM_ROWS))
    pd.DataFrame({
        "a": a, "b": b, "kind": np.where(rng.random(NUM_ROWS) < RARE, "rare", "usual"),
        "often": rng.integers(0, 4, NUM_ROWS), "years": years, "tiny": 1e-46,
        "claims": rng.poisson(years * np.exp(0.4 * a - 0.2 * b)),
    }).to_parquet(tmp_path / "rows.parquet")  # fmt: skip
    return {
        "name": "drawn", "loss": "bce_with_logits", "model": {"name": "mlp", "hidden": [4]},
        "data": {"train": str(tmp_path / "rows.parquet"), "inputs": ["a", "b"], "target": "kind",
                 "validation": 0.2, "test": 0.2, "sampling": {"balance": "kind", "rows": 70}},
        "training": {"epochs": 4, "batch_size": 12, "microbatch_size": 4},
        "checkpoint": {"every_steps": 3}, "storage": str(tmp_path / "runs"),
    }  # fmt: skip


def test_on_any_workers_and_after_a_kill_it_has_the_same_bits(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    assert_same_bits(partial(job_of, tree, tmp_path), tmp_path, [8, 14])


def test_classes_are_drawn_equally_often(tree: dict[str, Any], tmp_path: Path) -> None:
    job = job_of(tree, tmp_path)
    assert (job.rows_per_epoch, job.steps_per_epoch, job.num_steps) == (70, 6, 24)
    rows = np.concatenate([job.sampler().rows(step) for step in range(job.steps_per_epoch)])
    drawn: Any = job.train.gather(rows)["kind"]
    codes = np.bincount(drawn.numpy().astype(int) - int(drawn.min()))
    assert codes.tolist() == [35, 35]


def test_the_losses_are_plain_torchs_over_the_drawn_rows(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    sampling = {"data.sampling": {"weights": "often"}}
    job = job_of(merged(tree, sampling), tmp_path)
    weights: Any = job.train.columns(["often"], np.arange(job.num_rows))["often"]
    order = WeightedSampler(weights.numpy().astype(float), job.num_rows, 12, 0)
    objective = job.objective()
    optimizer = torch.optim.AdamW(objective.parameters())
    losses = []
    for step in range(job.num_steps):
        batch: Any = job.train.gather(order.rows(step))
        assert bool((batch["often"] > 0).all())
        truth = objective.terms[0].truth(batch)[0]
        loss = torch.nn.BCEWithLogitsLoss()(objective.predict(batch)["prediction"], truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    (tmp_path / "run").mkdir()
    train(job, RunDir(tmp_path / "run"))
    points = list(Reader(tmp_path / "run" / "curve.jsonl").new())
    assert [p["train"]["loss"] for p in points if "train" in p] == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.sampling": {"balance": "often"}}, "data.sampling.balance: 'often' is neither"),
        ({"data.sampling": {"balance": "kinds"}}, "neither target nor input; did you mean 'kind'"),
        ({"data.sampling": {"weights": "kind2"}}, "data.sampling.weights: no column 'kind2'"),
        ({"data.sampling": {"weights": "a"}}, "a: data.sampling.weights cannot be input"),
        ({"data.sampling": {"weights": "tiny"}}, "holds numbers too small to add up"),
        ({"data.sampling": {}}, "give either `balance` or `weights`"),
        ({"data.sampling": {"balance": "kind", "rows": 0}}, "data.sampling.rows"),
        ({"training.shuffle": False}, "data.sampling: does not go with training.shuffle: false"),
        ({"data.stream": True}, "data.sampling: does not go with data.stream"),
        ({"data.exposure": "years"}, "reads no rate, which data.exposure would multiply"),
        ({"data.exposure": "often", "data.target": "claims", "loss": "poisson_nll"},
         "data.exposure: column 'often' holds 0, and exposures are above 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(
    changes: dict[str, Any], message: str, tree: dict[str, Any]
) -> None:
    with pytest.raises((DataError, SpecError, PipelineError), match=message):
        check(tree, changes)


def test_a_rate_times_its_exposure_is_scikit_learns_poisson_regression(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    changes = {
        "data": {"train": str(tmp_path / "rows.parquet"), "inputs": ["a", "b"],
                 "target": "claims", "exposure": "years", "scale": "none"},
        "model": "linear", "loss": "poisson_nll", "optimizer": {"name": "sgd", "lr": 0.2},
        "training": {"epochs": 600, "batch_size": NUM_ROWS, "precision": "float64"},
    }  # fmt: skip
    result = pipeline.run({**tree, **changes})
    frame = pd.read_parquet(tmp_path / "rows.parquet")
    own = PoissonRegressor(alpha=0, tol=1e-10, max_iter=1000)
    own.fit(frame[["a", "b"]], frame["claims"] / frame["years"], sample_weight=frame["years"])
    rates = own.predict(frame[["a", "b"]])
    served = result.model.predict(frame[["a", "b", "years"]])["claims"]
    np.testing.assert_allclose(served, rates * frame["years"], rtol=1e-4)
    with pytest.raises(Exception, match="years"):
        result.model.predict(frame[["a", "b"]])


@pytest.mark.parametrize("change", [{"years": 0.0}, {"often": -1}])
def test_held_out_rows_with_such_numbers_are_refused_as_training_rows_are(
    change: dict[str, Any], tree: dict[str, Any], tmp_path: Path
) -> None:
    frame = pd.read_parquet(tmp_path / "rows.parquet")
    held = frame.iloc[:20].assign(**change)
    held.to_parquet(tmp_path / "held.parquet")
    data = {"train": str(tmp_path / "rows.parquet"), "inputs": ["a", "b"], "target": "claims",
            "exposure": "years", "sample_weight": "often",
            "validation": str(tmp_path / "held.parquet")}  # fmt: skip
    tree |= {"data": data, "model": "linear", "loss": "poisson_nll"}
    (name,) = change
    with pytest.raises(DataError, match=f"column '{name}' holds .*first at row 0"):
        check(tree)
    result = pipeline.run(merged(tree, {"data.validation": None}))
    if name == "years":
        with pytest.raises(Exception, match="exposures are above 0"):
            result.model.predict(held[["a", "b", "years"]])


@pytest.mark.parametrize("loss", ["zero_inflated_poisson", "negative_binomial", "tweedie"])
def test_exposures_are_the_same_on_any_workers(
    loss: str, tree: dict[str, Any], tmp_path: Path
) -> None:
    changes = {"data.exposure": "years", "data.target": "claims", "loss": loss,
               "data.sampling": None}  # fmt: skip
    assert_same_bits(partial(job_of, merged(tree, changes), tmp_path), tmp_path, [5])
