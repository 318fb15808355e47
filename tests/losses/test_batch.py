"""Losses of the whole batch by their formulas, written with loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tests.losses.formulas import mean


@pytest.mark.parametrize("symmetric", [False, True])
def test_info_nce_finds_each_rows_partner(symmetric: bool) -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 4, 3))
    cosine = [[a @ b / math.sqrt((a @ a) * (b @ b)) / 0.5 for b in second] for a in first]
    logits = np.array(cosine)

    def cross_entropy(table: Any) -> float:
        return float(np.mean([np.log(np.exp(table[i]).sum()) - table[i, i] for i in range(4)]))

    ways = (
        [cross_entropy(logits), cross_entropy(logits.T)] if symmetric else [cross_entropy(logits)]
    )
    got = mean("info_nce", first, second, temperature=0.5, symmetric=symmetric)
    assert got == pytest.approx(np.mean(ways))


def test_the_hardest_triplet_of_each_row() -> None:
    """Row 3 has no other row of its class, and is skipped."""
    points = np.array([[0.0, 0.0], [3.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    excess = [3.0 - 2.0, 3.0 - math.sqrt(13), 2.0 - math.sqrt(5)]
    expected = np.mean([max(0.0, each + 1.0) for each in excess])
    got = mean("triplet_batch_hard", points, np.array([0, 0, 0, 1]), margin=1.0)
    assert got == pytest.approx(expected)
    soft = np.mean([math.log1p(math.exp(each)) for each in excess])
    assert mean("triplet_batch_hard", points, np.array([0, 0, 0, 1])) == pytest.approx(soft)


def test_the_root_is_of_the_whole_batch() -> None:
    assert mean("rmse", [1.0, 2.0, 6.0], [1.0, 4.0, 2.0]) == pytest.approx(math.sqrt(20 / 3))


def test_dice_is_one_less_the_overlap() -> None:
    logits = np.log([0.8 / 0.2, 0.3 / 0.7])
    expected = 1 - (2 * 0.8 + 1) / (0.8 + 0.3 + 1 + 1)
    assert mean("dice", logits, [1.0, 0.0]) == pytest.approx(expected)
