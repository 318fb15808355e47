"""What a constant prediction gets: scikit-learn's dummies, trained on the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.metrics import (
    accuracy_score,
    f1_score,
    mean_absolute_error,
    r2_score,
    root_mean_squared_error,
)

from pipeline.rundir.records import Numbers
from pipeline.train.baselines import choose_baselines
from pipeline.train.evaluate import evaluate
from pipeline.train.term_metrics import choose_metrics, not_better
from tests.data.tables import job_of

RNG = np.random.default_rng(7)
TRAIN, HELD_OUT = 61, 30
CPU = torch.device("cpu")


def baselines(folder: Path, y: Any, loss: Any, metrics: list[str], **data: Any) -> Numbers:
    frame = pd.DataFrame({"a": RNG.normal(size=TRAIN + HELD_OUT), "y": y})
    frame[:TRAIN].to_parquet(folder / "train.parquet")
    frame[TRAIN:].to_parquet(folder / "held_out.parquet")
    data |= {"validation": str(folder / "held_out.parquet")}
    job = job_of(folder, "train.parquet", loss=loss, data=data)
    objective = job.objective()
    chosen = choose_metrics(objective.terms, metrics)
    assert job.validation is not None
    constant = choose_baselines(objective.terms, chosen, job.train)
    rows = np.arange(job.num_validation_rows)
    return evaluate(objective, job.validation, rows, 7, chosen, CPU, constant).baselines


@pytest.mark.parametrize("scale", ["none", "standard", "log", "robust"])
def test_amounts_are_predicted_by_their_mean_or_median(scale: str, tmp_path: Path) -> None:
    y = RNG.lognormal(size=TRAIN + HELD_OUT) * 100
    found = baselines(tmp_path, y, "mse", ["rmse", "mae", "r2"], target_scale=scale)
    for name, strategy, score in (
        ("rmse", "mean", root_mean_squared_error),
        ("r2", "mean", r2_score),
        ("mae", "median", mean_absolute_error),
    ):
        dummy = DummyRegressor(strategy=strategy).fit(np.zeros((TRAIN, 1)), y[:TRAIN])
        expected = score(y[TRAIN:], dummy.predict(np.zeros((HELD_OUT, 1))))
        assert found[name] == pytest.approx(expected, rel=1e-6, abs=1e-6), name


@pytest.mark.parametrize("loss", ["cross_entropy", "bce_with_logits", "soft_margin"])
@pytest.mark.parametrize("share", [0.2, 0.8])
def test_classes_are_predicted_by_the_most_frequent_one(
    loss: str, share: float, tmp_path: Path
) -> None:
    y = np.where(RNG.random(TRAIN + HELD_OUT) < share, "yes", "no")
    y[:2], y[-2:] = ["yes", "no"], ["yes", "no"]
    found = baselines(tmp_path, y, loss, ["accuracy", "f1"])
    dummy = DummyClassifier(strategy="most_frequent").fit(np.zeros((TRAIN, 1)), y[:TRAIN])
    predicted = dummy.predict(np.zeros((HELD_OUT, 1)))
    average: Any = {"average": "macro"} if loss == "cross_entropy" else {"pos_label": "yes"}
    assert found["accuracy"] == pytest.approx(accuracy_score(y[TRAIN:], predicted))
    assert found["f1"] == pytest.approx(f1_score(y[TRAIN:], predicted, zero_division=0, **average))


def test_a_model_that_is_no_better_is_told_so(tmp_path: Path) -> None:
    y = RNG.normal(size=TRAIN + HELD_OUT)
    found = baselines(tmp_path, y, "mse", ["rmse", "r2"])
    job = job_of(tmp_path, "train.parquet", data={})
    metrics = choose_metrics(job.terms, ["rmse", "r2"])
    (line,) = not_better(metrics, {"rmse": 0.1, "r2": -9.0}, found)
    assert line == f"r2 -9 is no better than the {found['r2']:.6g} of a constant"
    assert not_better(metrics, {"rmse": None}, found) == []
    assert not_better(metrics, {"rmse": 5.0}, {}) == []


@pytest.mark.parametrize("share", [0.4, 0.6])
def test_of_signs_as_numbers_the_more_frequent_one_is_the_constant(
    share: float, tmp_path: Path
) -> None:
    y = np.where(np.arange(TRAIN + HELD_OUT) % 10 < 10 * share, 1.0, -1.0)
    found = baselines(tmp_path, y, "soft_margin", ["accuracy", "f1"])
    most = 1.0 if share > 0.5 else -1.0
    said = np.full(HELD_OUT, most)
    assert found["accuracy"] == pytest.approx(accuracy_score(y[TRAIN:], said))
    assert found["f1"] == pytest.approx(f1_score(y[TRAIN:], said, zero_division=0))


def test_positions_that_share_a_scale_have_a_mean_each(tmp_path: Path) -> None:
    y = list(RNG.normal([0.0, 5.0, 9.0], size=(TRAIN + HELD_OUT, 3)))
    shared, own = (
        baselines(tmp_path, y, "mse", ["rmse", "r2", "mae"], target_scale=scale)
        for scale in ("shared", "standard")
    )
    assert shared == pytest.approx(own, rel=1e-4)
    matrix = np.stack(y)
    expected = root_mean_squared_error(
        matrix[TRAIN:], np.repeat(matrix[:TRAIN].mean(0)[None], HELD_OUT, 0)
    )
    assert shared["rmse"] == pytest.approx(expected, rel=1e-4)


def test_a_loss_without_a_task_has_no_usual_metrics(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": [0.0, 1.0] * 20, "y": [1.0, -1.0] * 20})
    frame.to_parquet(tmp_path / "train.parquet")
    job = job_of(tmp_path, "train.parquet", loss="cosine_embedding")
    assert choose_metrics(job.terms, None) == []


def test_a_model_may_tell_more_classes_apart_than_there_are(tmp_path: Path) -> None:
    y = np.array(["x", "y", "z"])[np.arange(TRAIN + HELD_OUT) % 3]
    frame = pd.DataFrame({"a": RNG.normal(size=len(y)), "y": y})
    frame.to_parquet(tmp_path / "train.parquet")
    model = {"name": "linear", "outputs": {"prediction": {"size": 5}}}
    job = job_of(tmp_path, "train.parquet", loss="cross_entropy", model=model,
                 data={"validation": 0.3})  # fmt: skip
    objective = job.objective()
    metrics = choose_metrics(objective.terms, None)
    constant = choose_baselines(objective.terms, metrics, job.train)
    assert job.validation is not None
    rows = np.arange(job.num_validation_rows)
    found = evaluate(objective, job.validation, rows, 7, metrics, CPU, constant, keep=True)
    assert found.baselines["log_loss"] == pytest.approx(np.log(3), rel=0.2)
