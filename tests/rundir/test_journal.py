"""The journal: each point once, in order, also when steps are recomputed after a crash."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.rundir.journal import (
    STEP_POINT,
    Journal,
    Reader,
    key_of,
    key_of_line,
    parse_line,
)
from pipeline.rundir.records import EvaluationPoint, StepPoint
from pipeline.rundir.repair import repair
from tests.conftest import happened


def point(step: int, loss: float) -> StepPoint:
    return {"step": step, "epoch": 0.1, "terms": {"mse": loss},
            "train": {"loss": loss}, "throughput": {"rows_per_second": step * 1.5}}  # fmt: skip


def test_a_torn_line_is_cut_and_recomputed_points_are_not_written_twice(tmp_path: Path) -> None:
    path = tmp_path / "curve.jsonl"
    journal = Journal(path)
    for step in (1, 2, 3):
        journal.write(point(step, 0.5 / step))
    journal.close()
    with path.open("ab") as file:
        file.write(b'{"step": 4, "tr')
    before = list(Reader(path).new())
    assert repair(path) == (3, "")
    again = Journal(path, step=1)
    for step in (2, 3, 4):
        again.write(point(step, 0.5 / step))
    again.close()
    after = list(Reader(path).new())
    assert after[:3] == before[:3]
    assert [p["step"] for p in after if "train" in p] == [1, 2, 3, 4]
    (event,) = happened(tmp_path, "recomputed")
    assert (event["step"], event["num_steps"], event["differs"]) == (3, 2, None)
    assert again.first_difference is None


def test_a_recomputed_step_with_other_numbers_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "curve.jsonl"
    journal = Journal(path)
    journal.write(point(1, 0.5))
    journal.write(point(2, 0.25))
    journal.close()
    again = Journal(path)
    again.write(point(1, 0.5))
    again.write(point(2, 0.2500001))
    again.close()
    assert again.first_difference == 2


def test_a_recomputed_evaluation_with_other_numbers_is_reported_after_a_restart_too(
    tmp_path: Path,
) -> None:
    path = tmp_path / "curve.jsonl"
    for loss in (0.5, 0.25):
        journal = Journal(path)
        evaluation: EvaluationPoint = {"step": 0, "epoch": 0.0, "validation": {"loss": loss}}
        journal.write(evaluation)
        journal.close()
    assert Journal(path).first_difference == 0
    (event,) = happened(tmp_path, "recomputed")
    assert (event["num_steps"], event["differs"]) == (0, 0)


def test_a_recomputation_that_stops_halfway_says_how_far_it_came(tmp_path: Path) -> None:
    path = tmp_path / "curve.jsonl"
    journal = Journal(path)
    for step in (1, 2, 3):
        journal.write(point(step, 0.5))
    journal.close()
    again = Journal(path, step=1)
    assert again.reached == 3
    again.write(point(2, 0.5))
    again.close()
    (event,) = happened(tmp_path, "recomputed")
    assert (event["step"], event["num_steps"]) == (2, 1)
    assert Journal(path, step=3).reached == 3


def test_steps_are_known_without_parsing_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "curve.jsonl"
    journal = Journal(path)
    evaluation: EvaluationPoint = {"step": 2, "epoch": 0.0, "validation": {"loss": 0.5}}
    journal.write(point(1, 0.5))
    journal.write(point(2, float("nan")))
    journal.write(evaluation)
    journal.event({"step": 2, "event": "stop"})
    journal.close()
    lines = path.read_bytes().splitlines(keepends=True)
    assert [bool(STEP_POINT.match(line)) for line in lines] == [True, True, False, False]
    assert list(map(key_of_line, lines)) == [key_of(parse_line(line)) for line in lines]
    for line in lines:
        with pytest.raises(ValueError, match="is damaged"):
            key_of_line(line.replace(b'"step": ', b'"step": 1'))
    assert Journal(path, step=2).reached == 2
