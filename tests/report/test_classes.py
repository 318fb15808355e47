"""Pictures of odd predictions: many classes, one class, no number."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeline.report import classes
from pipeline.report.classes import MAX_CONFUSED, MAX_LINES
from pipeline.rundir.held_out import TermPredictions

RNG = np.random.default_rng(0)


def term(prediction: Any, truth: Any, names: list[str], proper: bool = True) -> TermPredictions:
    task: Any = "classes" if truth.dtype != bool else "binary"
    ones, rows = np.ones(truth.shape), np.arange(len(truth))
    return TermPredictions("t", task, proper, names, [("no", "yes")], prediction, truth, ones, rows)


def drawn(one: TermPredictions) -> dict[str, Any]:
    return {exhibit.name: exhibit for exhibit in classes.exhibits(one)}


def test_of_very_many_classes_the_most_frequent_are_shown() -> None:
    shares = RNG.dirichlet(np.ones(200), size=500)
    truth = (RNG.integers(0, 200, 500) // 2).astype(np.int64)
    found = drawn(term(shares, truth, [f"class {i}" for i in range(200)]))
    assert len(found["confusion"].table["true"]) == MAX_CONFUSED
    assert "of 200 classes" in found["confusion"].caption
    assert len(set(found["roc"].table["class"])) == MAX_LINES
    assert len(found["per_class"].table["class"]) == 200


def test_one_class_alone_has_no_curves() -> None:
    found = drawn(term(np.full(9, 0.2, np.float32), np.zeros(9, bool), ["y"]))
    assert set(found) == {"confusion", "calibration"}


def test_scores_are_not_called_probabilities() -> None:
    found = drawn(term(RNG.normal(size=40), RNG.random(40) > 0.5, ["y"], proper=False))
    assert set(found) == {"confusion", "roc", "precision_recall"}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_predictions_that_are_no_numbers_draw_what_they_can(value: float) -> None:
    shares = RNG.normal(size=(20, 3))
    shares[4, 1] = value
    found = drawn(term(shares, RNG.integers(0, 3, 20), ["a", "b", "c"], proper=False))
    assert "per_class" in found
    assert np.sum([found["confusion"].table[f"predicted {name}"] for name in "abc"]) == 19


def test_very_many_classes_take_no_room_of_their_square() -> None:
    num = 60_000
    shares = np.full((40, num), 1e-6, np.float32)
    truth = RNG.integers(0, num, 40)
    shares[np.arange(40), truth] = 0.9
    found = drawn(term(shares, truth, [str(i) for i in range(num)]))
    assert len(found["confusion"].table["true"]) == MAX_CONFUSED
    assert sum(found["per_class"].table["rows"]) == 40


ODD = ["$\\frac{a$", "_hidden", "n" * 300, "a\nb <b>"]


@pytest.mark.filterwarnings("error:.*artists:UserWarning")
def test_names_are_names_whatever_they_hold() -> None:
    shares = RNG.dirichlet(np.ones(4), size=60)
    found = drawn(term(shares, RNG.integers(0, 4, 60), ODD))
    assert found["confusion"].table["true"] == ODD
    assert set(found["roc"].table["class"]) == set(ODD)


def test_no_items_draw_nothing() -> None:
    assert drawn(term(np.zeros((0, 3)), np.zeros(0, np.int64), ["a", "b", "c"])) == {}
