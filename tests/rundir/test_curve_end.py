"""What a curve comes to, read as it is written, is what all of its lines say."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.rundir.curve_end import CurveEnd, EndReader
from pipeline.rundir.journal import Journal, Reader, curve_sha256
from pipeline.rundir.records import EvaluationPoint, StepPoint
from pipeline.rundir.repair import repair


def step(number: int, loss: float | None) -> StepPoint:
    return {"step": number, "epoch": 0.1, "terms": {"mse": loss}, "train": {"loss": loss}}


def evaluation(number: int, loss: float) -> EvaluationPoint:
    return {"step": number, "epoch": 0.1, "validation": {"loss": loss}}


def test_it_is_the_same_read_at_once_and_bit_by_bit(tmp_path: Path) -> None:
    path = tmp_path / "curve.jsonl"
    journal, reader = Journal(path), EndReader(path)
    journal.write({**evaluation(0, 3.0), "baselines": {"r2": 0.0}})
    for number in range(1, 8):
        journal.write(step(number, None if number == 4 else 1 / number))
        journal.flush()
        list(reader.new())
    journal.write({**evaluation(7, 0.5), "notes": ["odd"]})
    journal.close()
    end, points = reader.read_end(), list(Reader(path).new())
    assert end.sha256 == curve_sha256(points)
    assert (end.loss, end.metrics, end.baselines) == (1 / 7, {"loss": 0.5}, {"r2": 0.0})
    assert (end.evaluated, end.notes) == (7, {0: [], 7: ["odd"]})
    (first,) = [p["time"] for p in points if "train" in p and p["step"] == 1]
    assert end.first_new == first / 1000


@pytest.mark.parametrize(
    ("losses", "note"),
    [
        ([3.0, 1.0, 1.09], ""),
        ([3.0, 1.0, 1.2], "lowest after step 1: 1, and is 1.2 now"),
        ([1.0, -2.0, -1.0], "lowest after step 1: -2, and is -1 now"),
        ([1.0, -2.0, -1.9], ""),
        ([3.0, 2.0, 1.0], ""),
    ],
    ids=str,
)
def test_a_validation_loss_that_has_risen_again_is_told(losses: list[float], note: str) -> None:
    end = CurveEnd()
    for number, loss in enumerate(losses):
        end.add({**evaluation(number, loss), "time": number})
    assert note in end.overfitting
    assert bool(note) == bool(end.overfitting)


def test_steps_of_an_earlier_command_are_not_new(tmp_path: Path) -> None:
    end = CurveEnd(since=5.0)
    for number, time in ((1, 4000), (2, 4999), (3, 5500), (4, 6000)):
        end.add({**step(number, 0.5), "time": time})
    assert end.first_new == 5.5


def test_lines_that_a_repair_cut_off_do_not_count(tmp_path: Path) -> None:
    """Without micro-batches their steps may have other last bits when they are recomputed."""
    path = tmp_path / "curve.jsonl"
    journal, reader = Journal(path), EndReader(path)
    for number in (1, 2, 3):
        journal.write(step(number, 0.5))
    journal.close()
    assert reader.read_end().loss == 0.5
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b'{"damaged": 1}\n' + lines[2])
    assert repair(path)[0] == 1
    journal = Journal(path, step=1)
    for number in (2, 3):
        journal.write(step(number, 0.25))
    journal.close()
    end = reader.read_end()
    assert end.sha256 == curve_sha256(list(Reader(path).new()))
    assert end.loss == 0.25


def test_two_repairs_between_two_looks_do_not_look_like_none(tmp_path: Path) -> None:
    """The second one's file may get the number of the first one's, which is free again."""
    path = tmp_path / "curve.jsonl"
    journal, reader = Journal(path), EndReader(path)
    journal.write(step(1, 0.5))
    journal.write(step(2, 0.5))
    journal.close()
    list(reader.new())
    for _ in range(2):
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(lines[0] + b"damaged\n")
        assert repair(path)[0] == 1
    journal = Journal(path, step=1)
    journal.write(step(2, 0.25))
    journal.close()
    end = reader.read_end()
    assert end.sha256 == curve_sha256(list(Reader(path).new()))
    assert end.loss == 0.25
