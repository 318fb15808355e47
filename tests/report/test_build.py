"""A report from a run's folder: its numbers against scikit-learn, and runs that show little."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk

from pipeline.report import amounts
from pipeline.report.amounts import MAX_COLUMNS
from pipeline.report.build import Report, build
from pipeline.report.curves import Curves
from pipeline.report.exhibit import Exhibit
from pipeline.report.facts import facts
from pipeline.rundir import RunDir
from pipeline.rundir.held_out import HeldOut
from pipeline.rundir.journal import Reader
from pipeline.rundir.records import Done
from pipeline.train.loop import train
from tests.data.tables import job_of

TRAIN, HELD_OUT = 120, 60
PNG = b"\x89PNG"


def run_of(folder: Path, loss: Any, target: Any, **changes: Any) -> RunDir:
    """A trained run on rows of which the inputs say something about every target."""
    rng = np.random.default_rng(7)
    num = TRAIN + HELD_OUT
    a, b = rng.normal(size=(2, num))
    frame = pd.DataFrame({
        "a": a, "b": b, "amount": 100 + 30 * a + rng.normal(size=num), "more": b,
        "kind": np.where(a > 0.5, "x", np.where(b > 0, "y", "z")),
        "yes": np.where(a + 0.3 * rng.normal(size=num) > 0, "ill", "well"),
        "flag": a > 0, "other": b > 0.5, "count": rng.poisson(np.exp(b)),
    })  # fmt: skip
    frame[:TRAIN].to_csv(folder / "train.csv", index=False)
    frame[TRAIN:].to_csv(folder / "held_out.csv", index=False)
    data = {"target": target, "inputs": ["a", "b"], "validation": str(folder / "held_out.csv")}
    settings = {"epochs": 8, "batch_size": 20} | changes.pop("training", {})
    job = job_of(folder, "train.csv", loss=loss, data=data, training=settings, **changes)
    run = RunDir(folder / "run")
    run.path.mkdir()
    train(job, run)
    return run


def titled(report: Report) -> dict[str, Exhibit]:
    return {one.title: one for one in report.exhibits}


def held_out_frame(run: RunDir) -> pd.DataFrame:
    return pd.read_csv(run.path.parent / "held_out.csv")


CURVES = ["Loss", "Metrics", "Learning rate and gradient norm"]
INPUTS, SPEED = "What the model relies on", "Throughput"
WORST = "The rows it is most wrong about"


def test_amounts(tmp_path: Path) -> None:
    run = run_of(tmp_path, "mse", "amount")
    report = build(run)
    shown = titled(report)
    pictures = ["Predicted against true amount", "Errors of amount", "Error by tenth of amount"]
    assert list(shown) == [*CURVES, *pictures, WORST, INPUTS, SPEED]
    assert [one.name[:3] for one in report.exhibits] == [f"{i:02}_" for i in range(1, 10)]
    assert all(one.png is None or one.png.startswith(PNG) for one in report.exhibits)
    assert shown[WORST].png is None
    (term,) = HeldOut.read(run.held_out).terms
    truth = held_out_frame(run)["amount"].to_numpy()
    assert term.truth[:, 0] == pytest.approx(truth, rel=1e-6)
    tenths = shown["Error by tenth of amount"].table
    errors = np.abs(term.prediction - term.truth)
    assert sum(tenths["rows"]) == HELD_OUT
    assert np.mean(tenths["mean_absolute_error"]) == pytest.approx(errors.mean(), rel=1e-4)


def test_the_worst_rows_are_those_of_the_file(tmp_path: Path) -> None:
    run = run_of(tmp_path, "mse", "amount")
    worst = titled(build(run))[WORST].table
    frame = held_out_frame(run)
    assert set(worst["file"]) == {str(tmp_path / "held_out.csv")}
    errors = worst["error"]
    assert errors == sorted(errors, reverse=True)
    for row, true, predicted, error in zip(
        worst["row"], worst["true"], worst["predicted"], errors, strict=True
    ):
        assert frame["amount"][row] == pytest.approx(true, rel=1e-5)
        assert abs(true - predicted) == pytest.approx(error, rel=1e-2, abs=1e-3)


def test_classes(tmp_path: Path) -> None:
    run = run_of(tmp_path, "cross_entropy", "kind")
    shown = titled(build(run))
    drawn = ["Confusion matrix", "Each class", "ROC", "Precision and recall", "Calibration"]
    assert list(shown) == [*CURVES, *drawn, WORST, INPUTS, SPEED]
    (term,) = HeldOut.read(run.held_out).terms
    truth = held_out_frame(run)["kind"]
    assert [term.names[code] for code in term.truth] == truth.tolist()
    chosen = [term.names[code] for code in term.prediction.argmax(1)]
    confusion = shown["Confusion matrix"].table
    counts = np.array([confusion[f"predicted {name}"] for name in "xyz"]).T
    assert counts.tolist() == sk.confusion_matrix(truth, chosen).tolist()
    scores = sk.precision_recall_fscore_support(truth, chosen, zero_division=np.nan)
    for name, expected in zip(("precision", "recall", "f1", "rows"), scores, strict=True):
        assert shown["Each class"].table[name] == pytest.approx(expected, rel=1e-3, nan_ok=True)


def test_yes_and_no_are_called_what_the_column_calls_them(tmp_path: Path) -> None:
    run = run_of(tmp_path, "bce_with_logits", "yes")
    shown = titled(build(run))
    assert shown["Confusion matrix"].table["true"] == ["ill", "well"]
    assert set(shown[WORST].table["true"]) <= {"ill", "well"}
    frame = held_out_frame(run)
    for row, true in zip(shown[WORST].table["row"], shown[WORST].table["true"], strict=True):
        assert frame["yes"][row] == true


def test_of_several_losses_each_has_its_own(tmp_path: Path) -> None:
    loss = [
        {"name": "bce_with_logits", "target": ["flag", "other"], "prediction": "flags"},
        {"name": "huber", "target": ["amount", "more"], "prediction": "amounts"},
        {"name": "poisson_nll", "target": "count", "prediction": "rate"},
    ]
    run = run_of(tmp_path, loss, ["flag", "other", "amount", "more", "count"])
    report = build(run)
    shown = titled(report)
    assert {"Each class (bce_with_logits)", "Errors of more (huber)"} <= set(shown)
    assert shown[f"{WORST} (huber)"].table["of"]
    assert len({one.name for one in report.exhibits}) == len(report.exhibits)
    losses = shown["Loss"].table
    assert len(set(losses["loss"])) == 4


def test_the_predictions_are_those_of_the_weights_that_became_the_model(tmp_path: Path) -> None:
    run = run_of(tmp_path, "mse", "amount", training={"best_by": "rmse", "epochs": 12},
                 optimizer={"name": "adam", "lr": 70.0})  # fmt: skip
    best = Done.read(run.done).best
    assert best is not None
    held_out = HeldOut.read(run.held_out)
    assert held_out.step == best.step < Done.read(run.done).steps
    (term,) = held_out.terms
    rmse = sk.root_mean_squared_error(term.truth, term.prediction)
    assert rmse == pytest.approx(best.value, rel=1e-6)


def test_no_validation_rows_leave_the_curve(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": np.arange(40.0), "y": np.arange(40.0)})
    frame.to_parquet(tmp_path / "rows.parquet")
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    train(job_of(tmp_path, "rows.parquet"), run)
    report = build(run)
    assert [one.title for one in report.exhibits] == [
        "Loss",
        "Learning rate and gradient norm",
        SPEED,
    ]
    assert report.notes == []


def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    run = run_of(tmp_path, "mse", "amount")
    run.held_out.write_bytes(run.held_out.read_bytes()[:-40])
    run.importance.write_text("{}")
    report = build(run)
    assert [one.title for one in report.exhibits] == [*CURVES, SPEED]
    assert "held_out.npz is damaged" in report.notes[0]
    assert "importance.json" in report.notes[1]


def test_a_run_of_no_steps_has_a_report_without_pictures(tmp_path: Path) -> None:
    assert build(RunDir(tmp_path)).exhibits == []


def test_each_of_several_columns_has_its_own_answers_and_positions_their_number(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=90)
    frame = pd.DataFrame({
        "a": a, "ill": np.where(a > 0, "ill", "well"), "smoker": np.where(a > 1, "smokes", "clean"),
        "many": list(rng.normal(size=(90, 6))),
    })  # fmt: skip
    frame.to_parquet(tmp_path / "rows.parquet")
    loss = [
        {"name": "bce_with_logits", "target": ["ill", "smoker"], "prediction": "flags"},
        {"name": "mse", "target": "many", "prediction": "many"},
    ]
    data = {"target": ["ill", "smoker", "many"], "inputs": ["a"], "validation": 0.3}
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    train(job_of(tmp_path, "rows.parquet", loss=loss, data=data), run)
    shown = titled(build(run))
    worst = shown[f"{WORST} (bce_with_logits)"].table
    for of, true in zip(worst["of"], worst["true"], strict=True):
        assert true in {"ill": ("ill", "well"), "smoker": ("clean", "smokes")}[of]
    assert "Errors of many[0] (mse)" in shown
    assert len([title for title in shown if title.startswith("Errors of")]) == MAX_COLUMNS


def test_what_cannot_be_drawn_leaves_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tmp_path, "mse", "amount")

    def fail(*_: Any) -> None:
        raise ArithmeticError("odd numbers")

    monkeypatch.setattr(amounts, "exhibits", fail)
    report = build(run)
    assert [one.title for one in report.exhibits] == [*CURVES, INPUTS, SPEED]
    assert report.notes == ["the predictions of mse cannot be shown: odd numbers"]


def test_a_run_without_a_record_has_facts_too(tmp_path: Path) -> None:
    run = run_of(tmp_path, "mse", "amount", training={"best_by": "rmse"})
    found = facts(run, Curves().add(Reader(run.journal).new()))
    assert found["state"].startswith("finished after")
    assert "rmse" in found["model"]
