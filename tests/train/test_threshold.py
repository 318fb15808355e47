"""Thresholds against every other one, by scikit-learn; and as they are trained and served."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import metrics as sk

import pipeline
from pipeline.errors import PipelineError, SpecError
from pipeline.launch.evaluate import evaluate
from pipeline.launch.run import check
from pipeline.report.build import build
from pipeline.rundir import RunDir
from pipeline.rundir.held_out import HeldOut
from pipeline.train.threshold import SCORES, best_threshold
from tests.conftest import merged
from tests.killed import assert_same_bits, job_of

OWN: dict[str, Any] = {
    "f1": partial(sk.f1_score, zero_division=0),
    "balanced_accuracy": sk.balanced_accuracy_score,
    "accuracy": sk.accuracy_score,
}


@pytest.mark.parametrize("metric", SCORES)
@pytest.mark.parametrize("decimals", [1, 8])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_no_other_threshold_is_better(metric: Any, decimals: int, is_weighted: bool) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        truth = rng.random(30) < 0.3
        truth[:2] = True, False
        share = np.clip(rng.normal(0.4 + 0.2 * truth, 0.3), 0, 1).round(decimals).astype("float32")
        weight = rng.random(30) if is_weighted else np.ones(30)
        given, answers, counts = map(torch.from_numpy, (share, truth, weight))
        threshold, score = best_threshold(given, answers, counts, SCORES[metric])
        found = OWN[metric](truth, share > threshold, sample_weight=weight)
        assert score == pytest.approx(found)
        candidates = [-0.1, *np.unique(share)]
        each = [OWN[metric](truth, share > one, sample_weight=weight) for one in candidates]
        assert found == pytest.approx(max(each))


def test_it_stands_between_two_probabilities() -> None:
    share, truth = torch.tensor([0.1, 0.3, 0.7, 0.9]), torch.tensor([False, False, True, True])
    threshold, score = best_threshold(share, truth, torch.ones(4), SCORES["f1"])
    assert threshold == pytest.approx(0.5)
    assert score == 1.0
    for rows in (torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)):
        assert np.isnan(best_threshold(share, rows, torch.ones(4), SCORES["f1"])).all()


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    a = rng.normal(size=200)
    pd.DataFrame({
        "a": a, "flag": np.where(a + rng.normal(size=200) > 1.4, "active", "gone"),
        "other": rng.random(200) < 0.2,
    }).to_parquet(tmp_path / "rows.parquet")  # fmt: skip
    return {
        "name": "decided", "loss": "bce_with_logits", "model": "linear",
        "data": {"train": str(tmp_path / "rows.parquet"), "inputs": ["a"],
                 "target": ["flag", "other"], "validation": 0.3, "test": 0.2,
                 "positive": {"flag": "active"}},
        "training": {"epochs": 4, "batch_size": 16, "microbatch_size": 4, "threshold": "f1",
                     "best_by": "roc_auc"},
        "checkpoint": {"every_steps": 3}, "storage": str(tmp_path / "runs"),
    }  # fmt: skip


@pytest.mark.processes
def test_on_any_workers_and_after_a_kill_it_has_the_same_bits(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    assert_same_bits(partial(job_of, tree, tmp_path), tmp_path, [8])


@pytest.mark.processes
def test_it_is_recorded_and_served_and_judged_with(tree: dict[str, Any], tmp_path: Path) -> None:
    result = pipeline.run(tree)
    frame = pd.read_parquet(tmp_path / "rows.parquet")
    served = result.model.predict(frame[["a"]])
    for column, yes in (("flag", "active"), ("other", True)):
        threshold = result.decision[f"threshold/{column}"]
        assert threshold is not None
        shares = served[f"{column}_probability_{yes}"]
        assert ((served[column] == yes) == (shares > threshold)).all()
    assert len(set(served["flag"])) == 2  # at a half none would be active
    found = evaluate(result.storage, [str(tmp_path / "rows.parquet")], record=False).metrics
    each = [sk.f1_score(frame["flag"] == "active", served["flag"] == "active"),
            sk.f1_score(frame["other"], served["other"])]  # fmt: skip
    truth = np.stack([frame["flag"] == "active", frame["other"]])
    said = np.stack([served["flag"] == "active", served["other"]])
    assert found["f1"] == pytest.approx(sk.f1_score(truth.ravel(), said.ravel()))
    assert min(each) > 0
    (shown,) = [one for one in build(RunDir(Path(result.storage))).exhibits if "class" in one.table
                and one.title == "Each class"]  # fmt: skip
    held_out = HeldOut.read(RunDir(Path(result.storage)).held_out)
    (term,) = held_out.terms
    answers: list[tuple[str, Any]] = [("flag", "active"), ("other", True)]
    for place, (column, yes) in enumerate(answers):
        rows = frame.iloc[[held_out.find(row)[1] for row in term.row[:, place]]]
        said = result.model.predict(rows[["a"]])[column] == yes
        wanted = sk.precision_score(rows[column] == yes, said, zero_division=np.nan)
        assert shown.table["precision"][place] == pytest.approx(wanted, abs=1e-4, nan_ok=True)


@pytest.mark.processes
def test_a_number_holds_from_the_start(tree: dict[str, Any]) -> None:
    number = merged(tree, {"training.threshold": 0.123, "data.target": "flag"})
    result = pipeline.run(number)
    assert result.decision == {}
    served = result.model.predict(pd.DataFrame({"a": np.linspace(-2, 3, 50)}))
    yes = served["flag_probability_active"] > np.float32(0.123)
    assert ((served["flag"] == "active") == yes).all()
    assert yes.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training.threshold": "f2"}, "training.threshold"),
        ({"training.threshold": 1.0}, "training.threshold"),
        ({"data.validation": None, "training.best_by": None}, "needs rows to be chosen on"),
        ({"data.target": "a", "data.inputs": ["other"], "loss": "mse", "data.positive": {},
          "training.best_by": None}, "gives no probability of yes"),
        ({"data.positive": {"flag": "activ"}}, "no value 'activ' in a training row.*'active'"),
        ({"data.positive": {"flags": "active"}}, "data.positive: 'flags' is not a target"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(
    changes: dict[str, Any], message: str, tree: dict[str, Any]
) -> None:
    with pytest.raises((SpecError, PipelineError), match=message):
        check(merged(tree, changes))


@pytest.mark.processes
def test_two_terms_on_one_target_decide_each_for_itself(tree: dict[str, Any]) -> None:
    losses = [
        {"name": "bce_with_logits", "prediction": "one", "label": "plain", "target": "flag"},
        {"name": "bce_with_logits", "prediction": "two", "label": "heavy", "target": "flag",
         "pos_weight": 20},
    ]  # fmt: skip
    tree |= {"loss": losses, "model": {"name": "mlp", "hidden": [4]}}
    result = pipeline.run(merged(tree, {"training.best_by": "loss"}))
    low, high = (result.decision[f"threshold/{name}/flag"] for name in ("plain", "heavy"))
    assert low is not None
    assert high is not None
    assert low != high


def test_it_is_kept_in_the_precision_of_the_job(tree: dict[str, Any], tmp_path: Path) -> None:
    wide = job_of(merged(tree, {"training.precision": "float64"}), tmp_path).objective()
    assert wide.get_buffer("threshold_0").dtype == torch.float64
    share = torch.tensor([1 - 1e-9, 1.0], dtype=torch.float64)
    answers = torch.tensor([False, True])
    threshold, _ = best_threshold(share, answers, torch.ones(2), SCORES["f1"])
    assert (share > threshold).tolist() == [False, True]


def test_classes_have_no_positive_one(tree: dict[str, Any]) -> None:
    changes = {"data.target": "flag", "loss": "cross_entropy", "training.threshold": None}
    with pytest.raises(PipelineError, match=r"data\.positive\.flag: is for losses of yes and no"):
        check(merged(tree, changes))
