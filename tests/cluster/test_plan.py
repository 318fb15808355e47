"""What a submission knows before it is sent; the rest is in `tests/scenarios/test_submit.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.cluster.plan import make_plan
from pipeline.errors import UsageError
from pipeline.launch.run import CHECKED, check, seal_of
from tests.conftest import Write


class Nobody:
    """A cluster without nodes, to which nothing was submitted."""

    def nodes(self) -> list[Any]:
        return []

    def submissions(self, job: str) -> list[Any]:
        return []


def test_a_record_that_only_this_machine_has_is_refused_where_runs_are_in_a_store(
    job: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    cluster: Any = Nobody()
    path = job({"storage": f"file://{tmp_path / 'store'}"})
    with pytest.raises(UsageError, match="is of this machine alone: give the address of a server"):
        make_plan(cluster, str(path), [], {}, [], fresh=False)


def test_a_job_that_was_checked_is_checked_again_only_when_it_is_another(
    job: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = job()
    monkeypatch.setenv(CHECKED, seal_of(check(path)[1]))
    checked: list[Any] = []

    def check_job(job: Any) -> list[Any]:
        checked.append(job)
        return []

    monkeypatch.setattr("pipeline.checks.job.check", check_job)
    assert check(path)[2] == []
    assert checked == []
    check(path, {"workers.num": 2})  # which changes nothing that is trained
    assert checked == []
    check(path, {"training.batch_size": 3})
    assert len(checked) == 1
    monkeypatch.setattr("pipeline.train.determinism.versions", lambda: {"torch": "1"})
    check(path)
    assert len(checked) == 2
