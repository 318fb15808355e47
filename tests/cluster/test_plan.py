"""What a submission knows before it is sent; the rest is in `tests/scenarios/test_submit.py`."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.launch.run import CHECKED, check, seal_of
from tests.conftest import Write


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
