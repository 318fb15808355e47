"""What one node lacks is one error of all workers, with node, rank and what to change."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import DataError, RunError
from pipeline.rundir import RunDir
from pipeline.spec import load
from pipeline.train import nodes
from pipeline.train.assignment import Assignment
from pipeline.train.determinism import versions
from pipeline.train.drains import Notices
from pipeline.train.job import prepare
from pipeline.train.nodes import prepare_together
from tests.conftest import rows
from tests.processes import on_workers

pytestmark = pytest.mark.processes


@pytest.fixture
def told(tmp_path: Path) -> Assignment:
    for name in ("here", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "here" / "rows.csv").write_text(rows())
    data = {"train": "rows.csv", "inputs": ["a"], "target": "y"}
    spec = load({"name": "t", "model": "linear", "loss": "mse", "data": data})
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.spec.write_text(spec.dump())
    base = tmp_path / "here"
    return Assignment(spec, base, run, [], {}, prepare(spec, base).fingerprint, versions())


def asked(rank: int, num: int, *, told: Assignment, odd: dict[str, Any], late: float) -> str:
    """What a worker is told, of whom the second one has an odd node."""
    if rank == 1:
        told = replace(told, **odd)
        now = time.time
        nodes.time.time = lambda: now() + late  # type: ignore[attr-defined]
    try:
        notices = Notices()
        prepare_together(told, notices)
        return "" if notices.empty() else notices.get().text
    except (RunError, DataError) as error:
        return f"{type(error).__name__}: {error}"


def answers(told: Assignment, odd: dict[str, Any], late: float = 0.0) -> list[str]:
    return on_workers(3, partial(asked, told=told, odd=odd, late=late))


def test_all_is_well(told: Assignment) -> None:
    assert answers(told, {}) == ["", "", ""]


@pytest.mark.parametrize(
    ("odd", "text"),
    [
        ("run", "RunError: worker 1 of 3, on node {ip}: does not see the run's folder {at}/other; "
                "set `storage` to a folder that every node mounts, or to an object "
                "store (s3://...)"),
        ("base", "DataError: worker 1 of 3, on node {ip}: data.train: no such file or folder: "
                 "rows.csv (looked in {at}/elsewhere)"),
        ("versions", "RunError: worker 1 of 3, on node {ip}: has torch {torch}, not 1.0 as the "
                     "command that started it; give all nodes one image"),
        ("fingerprint", "RunError: worker 1 of 3, on node {ip}: reads other rows from rows.csv "
                        "than the command that started it; every node must see the same files"),
    ],
)  # fmt: skip
def test_what_a_node_lacks_is_told_by_all(
    odd: str, text: str, told: Assignment, tmp_path: Path
) -> None:
    changed = {
        "run": RunDir(tmp_path / "other"), "base": tmp_path / "elsewhere", "fingerprint": "x",
        "versions": told.versions | {"torch": "1.0"},
    }[odd]  # fmt: skip
    found = answers(told, {odd: changed})
    ip = found[0].partition("node ")[2].partition(":")[0]
    expected = text.format(ip=ip, at=tmp_path, torch=told.versions["torch"])
    assert found == [expected] * 3


def test_clocks_that_are_apart_are_told(told: Assignment) -> None:
    for note in answers(told, {}, late=100.0):
        assert note.startswith("clocks differ from node ")
        assert re.search(r"\+(9[89]|10[0-2]) s off", note)
