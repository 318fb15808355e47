"""Metrics of a job's validation rows against scikit-learn, on 1, 3 and 5 workers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import metrics as sk

from pipeline.rundir.records import Numbers
from pipeline.train import gathered
from pipeline.train.evaluate import evaluate
from pipeline.train.job import Job
from pipeline.train.term_metrics import choose_metrics
from tests.data.tables import job_of
from tests.processes import on_workers

TRAIN, HELD_OUT = 90, 41
CPU = torch.device("cpu")
LOSSES = {
    "classes": "cross_entropy",
    "yes": "bce_with_logits",
    "amount": "mse",
    "count": "poisson_nll",
}
CASES = [(target, is_weighted) for target in LOSSES for is_weighted in (False, True)]


def job(folder: Path, target: str, is_weighted: bool) -> Job:
    weight = {"column": "w", "in_metrics": True} if is_weighted else None
    data = {"validation": str(folder / "held_out.parquet"), "target": target, "inputs": ["a", "b"]}
    data |= {"sample_weight": weight}  # type: ignore[dict-item]
    precision = {"precision": "float64"}
    return job_of(folder, "train.parquet", loss=LOSSES[target], data=data, training=precision)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(7)
    made: Path = tmp_path_factory.mktemp("rows")
    num = TRAIN + HELD_OUT
    a, b = rng.normal(size=(2, num))
    frame = pd.DataFrame({
        "a": a.round(1), "b": b.round(1), "w": rng.random(num) * (rng.random(num) > 0.2),
        "classes": np.where(a > 0.5, "x", np.where(b > 0, "y", "z")),
        "yes": a + rng.normal(size=num) > 1, "amount": 100 + 30 * a,
        "count": rng.poisson(np.exp(b)),
    })  # fmt: skip
    frame[:TRAIN].to_parquet(made / "train.parquet")
    frame[TRAIN:].to_parquet(made / "held_out.parquet")
    return made


def found(folder: Path, target: str, is_weighted: bool) -> Numbers:
    made = job(folder, target, is_weighted)
    objective = made.objective()
    assert made.validation is not None
    metrics = choose_metrics(objective.terms, None, is_weighted)
    rows = np.arange(made.num_validation_rows)
    return evaluate(objective, made.validation, rows, 6, metrics, CPU).values  # ragged: 41 rows


def found_all(folder: Path, rank: int = 0, num: int = 1) -> list[Numbers]:
    return [found(folder, target, is_weighted) for target, is_weighted in CASES]


def expected(folder: Path, target: str, is_weighted: bool) -> dict[str, Any]:
    """scikit-learn's, of the predictions of all rows at once."""
    made = job(folder, target, is_weighted)
    objective = made.objective()
    assert made.validation is not None
    batch = made.validation.gather(np.arange(made.num_validation_rows))
    term = objective.terms[0]
    with torch.no_grad():
        served = term.served(None, objective.predict(batch)).double().numpy()
    frame = pd.read_parquet(folder / "held_out.parquet")
    truth = frame[target].to_numpy()
    w: Any = {"sample_weight": frame["w"].to_numpy() if is_weighted else None}
    if target == "classes":
        chosen = np.array(["x", "y", "z"])[served.argmax(1)]
        served /= served.sum(1, keepdims=True)  # to float64's rounding, as scikit-learn wants it
        return {
            "accuracy": sk.accuracy_score(truth, chosen, **w),
            "balanced_accuracy": sk.balanced_accuracy_score(truth, chosen, **w),
            "f1": sk.f1_score(truth, chosen, average="macro", zero_division=0, **w),
            "log_loss": sk.log_loss(truth, served, **w),
            "roc_auc": sk.roc_auc_score(truth, served, multi_class="ovr", **w),
            "average_precision": sk.average_precision_score(truth, served, **w),
        }
    if target == "yes":
        said = served > 0.5
        return {
            "roc_auc": sk.roc_auc_score(truth, served, **w),
            "average_precision": sk.average_precision_score(truth, served, **w),
            "f1": sk.f1_score(truth, said, **w),
            "balanced_accuracy": sk.balanced_accuracy_score(truth, said, **w),
            "accuracy": sk.accuracy_score(truth, said, **w),
            "log_loss": sk.log_loss(truth, served, **w),
            "brier": sk.brier_score_loss(truth, served, **w),
        }
    served = served.reshape(-1)
    scores = {
        "r2": sk.r2_score(truth, served, **w),
        "rmse": sk.root_mean_squared_error(truth, served, **w),
        "mae": sk.mean_absolute_error(truth, served, **w),
        "median_absolute_error": sk.median_absolute_error(truth, served, **w),
    }
    if target == "count":
        scores["poisson_deviance"] = sk.mean_poisson_deviance(truth, served, **w)
    return scores


@pytest.mark.parametrize(("target", "is_weighted"), CASES)
def test_the_usual_metrics_are_scikit_learns(folder: Path, target: str, is_weighted: bool) -> None:
    wanted = expected(folder, target, is_weighted)
    alone = found(folder, target, is_weighted)
    assert set(alone) - set(wanted) <= {"loss", "calibration_error"}
    assert {name: alone[name] for name in wanted} == pytest.approx(wanted, rel=1e-9)


@pytest.mark.processes
@pytest.mark.parametrize("num", [3, 5])
def test_they_are_the_same_on_any_number_of_workers(folder: Path, num: int) -> None:
    alone = found_all(folder)
    for one in on_workers(num, partial(found_all, folder)):
        assert one == alone


def test_more_than_fits_has_no_value(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathered, "MAX_GATHERED", HELD_OUT - 1)
    made = job(folder, "yes", False)
    objective = made.objective()
    assert made.validation is not None
    metrics = choose_metrics(objective.terms, ["accuracy", "roc_auc"])
    rows = np.arange(made.num_validation_rows)
    evaluation = evaluate(objective, made.validation, rows, 6, metrics, CPU)
    assert evaluation.values["roc_auc"] is None
    assert evaluation.values["accuracy"] is not None
    assert any(note.startswith("roc_auc has no value") for note in evaluation.notes)
