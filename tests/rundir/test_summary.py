"""What a folder says of its run, while it trains and after."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.render import comparison_lines, runs_lines
from pipeline.report.compare import Difference, compare
from pipeline.rundir import RunDir
from pipeline.rundir.journal import Journal
from pipeline.rundir.records import DataFacts, Ended, Launcher, Numbers, Record
from pipeline.rundir.summary import Summary, summaries, summary

DATA = DataFacts(
    name="t", fingerprint="f", files=["a.csv"], num_files=1, rows={"train": 9}, digests={},
    dropped=0, columns={}, profile={},
)  # fmt: skip


def run_of(storage: Path, name: str, losses: list[float], **changes: Any) -> RunDir:
    run = RunDir(storage / name)
    run.path.mkdir()
    facts: dict[str, Any] = {
        "name": name, "job": "t", "experiment": "t", "register_as": None, "tracking_uri": "",
        "params": {"model.name": "mlp"}, "data": DATA, "spec": "", "fields": [], "example": "",
        "tags": {}, "versions": {}, "token": "", "digest": "", "imports_sha256": "", "modules": [],
        "num_workers": 1, "num_steps": 9, "primary_metric": "validation/r2",
        "is_lower_better": False, "command": "", "is_copied": False,
        "launcher": Launcher(id="", pid=1, host=""),
    }  # fmt: skip
    Record(**facts | changes).write(run.record)
    journal = Journal(run.journal)
    first: Numbers = {"loss": 2.0, "r2": 0.1}
    journal.write({"step": 0, "epoch": 0.0, "validation": first, "baselines": {"r2": -0.1}})
    for step, loss in enumerate(losses, 1):
        journal.write({"step": step, "epoch": 1.0, "train": {"loss": loss}, "terms": {"mse": loss}})
    journal.write({"step": len(losses), "epoch": 1.0, "validation": {"loss": 1.0, "r2": 0.5}})
    journal.close()
    return run


def summary_of(run: RunDir) -> Summary:
    found = summary(run)
    assert found is not None
    return found


def test_the_last_evaluation_beside_the_first_ones_baselines(tmp_path: Path) -> None:
    found = summary_of(run_of(tmp_path, "t-1", [3.0, 2.0]))
    assert (found.state, found.steps) == ("stopped", 2)
    assert (found.metrics["r2"], found.baselines["r2"]) == (0.5, -0.1)
    assert 0 <= found.seconds < 60
    assert 0 <= found.age < 60


def test_a_run_without_validation_rows_is_listed_with_its_test_rows(tmp_path: Path) -> None:
    run = run_of(tmp_path, "t-1", [3.0], primary_metric="train/loss")
    found = replace(summary_of(run), metrics={"test/loss": 0.25}, baselines={})
    assert re.search(r"test/loss +0\.25", "\n".join(runs_lines([found])))


def test_a_run_is_training_while_a_command_has_it(tmp_path: Path) -> None:
    run = run_of(tmp_path, "t-1", [3.0])
    with run.locked():
        assert summary_of(run).state == "training"
    (run.path / ".lock-holder").write_text("left by a command that was killed")
    assert summary_of(run).state == "stopped"
    with run.locked():  # asking has not taken it
        pass
    Ended(state="failed", reason="x").write(run.ended)
    assert summary_of(run).state == "failed"


def test_folders_that_are_no_runs_are_left_out(tmp_path: Path) -> None:
    for name in ("t-1", "t-2"):
        run_of(tmp_path, name, [1.0])
        time.sleep(0.01)
    (tmp_path / "mlflow-artifacts").mkdir()
    (tmp_path / "mlflow.db").touch()
    (tmp_path / "t-3").mkdir()
    (tmp_path / "t-3" / "record.json").write_text("{}")
    assert [one.run.name for one in summaries(tmp_path)] == ["t-2", "t-1"]


@pytest.mark.parametrize("tail", [b"{", b"\xff\n", b'{"step": 3, "train": {"loss": 1}}\n'])
def test_a_damaged_end_of_the_journal_is_left_out(tmp_path: Path, tail: bytes) -> None:
    run = run_of(tmp_path, "t-1", [3.0, 2.0])
    with run.journal.open("ab") as file:
        file.write(tail)
    assert summary_of(run).metrics["r2"] == 0.5


def test_a_run_that_has_not_begun(tmp_path: Path) -> None:
    run = run_of(tmp_path, "t-1", [])
    run.journal.unlink()
    found = summary_of(run)
    assert (found.state, found.steps, found.metrics) == ("stopped", 0, {})
    assert not compare([found, found]).has_curve


def test_a_lock_that_cannot_be_opened_hides_no_run(tmp_path: Path) -> None:
    run = run_of(tmp_path, "t-1", [1.0])
    (run.path / ".lock").mkdir()
    (run.path / ".lock-holder").touch()
    assert [one.state for one in summaries(tmp_path)] == ["stopped"]


def test_a_curve_that_goes_on_where_another_ends_is_no_other_one(tmp_path: Path) -> None:
    runs = [run_of(tmp_path, "t-1", [3.0, 2.0]), run_of(tmp_path, "t-2", [3.0, 2.0, 1.0])]
    found = compare([summary_of(run) for run in runs])
    assert found.differences == [Difference(3, 0.0, is_longer=True)]
    assert comparison_lines(found)[-1].endswith(
        "t-2 has the same curve as t-1 before step 3, where one of them ends"
    )


def test_runs_are_compared_with_the_first(tmp_path: Path) -> None:
    other_data = DATA.model_copy(update={"fingerprint": "other"})
    runs = [
        run_of(tmp_path, "t-1", [3.0, 2.0, 1.0]),
        run_of(tmp_path, "t-2", [3.0, 2.0, 1.0]),
        run_of(tmp_path, "t-3", [3.0, 2.5, 1.0], params={"model.name": "cnn", "x": "1"}),
        run_of(tmp_path, "t-4", [3.0, 2.0], data=other_data),
    ]
    found = compare([summary_of(run) for run in runs])
    assert found.differences == [None, Difference(2, 0.2), Difference(3, 0.0, is_longer=True)]
    assert found.same_rows == [True, True, False]
    assert found.has_curve
    assert found.changes == {
        "model.name": ["mlp", "mlp", "cnn", "mlp"], "x": ["-", "-", "1", "-"]
    }  # fmt: skip
    assert found.metrics["r2"] == [0.5] * 4
