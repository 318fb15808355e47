"""Curves of a journal, thinned for people."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.report import curves
from pipeline.report.curves import MAX_POINTS, Curves, thin
from pipeline.rundir.records import Numbers, Point


def points(num: int) -> list[Point]:
    made: list[Point] = []
    for step in range(1, num + 1):
        norm = None if step == 2 else 1.0
        train: Numbers = {"loss": 1 / step, "learning_rate": 0.1, "gradient_norm": norm}
        made.append({"step": step, "epoch": 1.0, "terms": {"mse": 0.5}, "train": train})
    evaluation: Numbers = {"loss": 0.5, "r2": 0.9}
    made.append({"step": num, "epoch": 1.0, "validation": evaluation, "baselines": {"r2": 0.0}})
    return made


def test_points_are_taken_in_as_they_are_read() -> None:
    whole, parts = Curves().add(points(5)), Curves()
    for point in points(5):
        parts.add([point])
    for one in (whole, parts):
        assert one.train["loss"][1].tolist() == [1 / step for step in range(1, 6)]
        assert one.train["gradient_norm"][0].tolist() == [1, 3, 4, 5]
        assert one.validation["r2"][0].tolist() == [5]
        assert one.baselines == {"r2": 0.0}


def test_a_long_line_keeps_its_mean_and_its_end() -> None:
    steps = np.arange(1.0, 12_346.0)
    values = np.random.default_rng(0).normal(size=len(steps))
    short = thin(steps, values)
    assert len(short[0]) == MAX_POINTS
    assert short[0][-1] == steps[-1]
    sizes = np.diff([0, *short[0]])
    assert (short[1] * sizes).sum() / len(steps) == pytest.approx(values.mean())


def test_a_long_curve_says_that_its_points_are_means() -> None:
    loss = curves.exhibits(Curves().add(points(MAX_POINTS + 1)))[0]
    assert "mean of several steps" in loss.caption
    assert len(loss.table["step"]) == MAX_POINTS + 1  # and one of the validation rows
