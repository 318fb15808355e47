"""Pictures of odd amounts: many rows, one row, all the same, no number."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeline.report import amounts
from pipeline.rundir.held_out import TermPredictions

RNG = np.random.default_rng(0)


def term(prediction: Any, truth: Any) -> TermPredictions:
    says, true = (np.asarray(values, float).reshape(-1, 1) for values in (prediction, truth))
    ones, rows = np.ones(true.shape), np.arange(len(true))[:, None]
    return TermPredictions("t", "values", False, ["y"], [], says, true, ones, rows)


@pytest.mark.parametrize(
    ("prediction", "truth"),
    [
        (RNG.normal(size=5000), RNG.normal(size=5000)),
        ([1.0], [2.0]),
        (np.ones(30), np.ones(30)),
        (np.full(30, np.nan), np.arange(30.0)),
        ([1.0, np.inf, 3.0], [1.0, 2.0, 3.0]),
        (1e30 * RNG.normal(size=30), np.arange(30.0)),
        (np.zeros(30), 1.7e18 + 1e9 * np.arange(30.0)),
        (np.zeros(30), np.full(30, 1.5e17)),
    ],
    ids=["many", "one", "constant", "nan", "inf", "huge", "alike", "the same"],
)
def test_they_are_drawn(prediction: Any, truth: Any) -> None:
    made = amounts.exhibits(term(prediction, truth))
    if np.isnan(prediction).all():
        assert made == []
        return
    assert [one.name for one in made] == ["predicted_y", "errors_y", "tenths_y"]
    assert all(one.png for one in made)
