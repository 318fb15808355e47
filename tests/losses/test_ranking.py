"""Losses of scores and distances by formulas that anyone can check by hand."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline import registry
from pipeline.losses import build
from tests.losses.formulas import mean

LEFT, RIGHT, FAR = [[3.0, 0.0]], [[0.0, 4.0]], [[3.0, 2.0]]


def test_a_score_above_the_other_by_a_margin() -> None:
    expected = (0.0 + (0.5 + 1.0)) / 2  # 2 is above 0; 1 is above 0.5 where it should be below
    assert mean("margin_ranking", [2.0, 1.0], [0.0, 0.5], [1.0, -1.0], margin=1.0) == (
        pytest.approx(expected)
    )


def test_small_distances_where_alike_and_a_margin_where_not() -> None:
    assert mean("hinge_embedding", [0.25, 0.25], [1.0, -1.0]) == pytest.approx((0.25 + 0.75) / 2)


def test_a_distance_is_served_as_the_label_whose_loss_is_less() -> None:
    served = build(registry.losses["hinge_embedding"], {"margin": 3.0}).link
    distances = torch.tensor([0.2, 1.4, 1.6, 4.0])
    alike, unlike = (
        [mean("hinge_embedding", [d], [sign], margin=3.0) for d in distances.tolist()]
        for sign in (1.0, -1.0)
    )
    assert served is not None
    assert (served(distances) > 0).tolist() == [a < b for a, b in zip(alike, unlike, strict=True)]


def test_the_angle_between_two_vectors() -> None:
    assert mean("cosine_embedding", LEFT, RIGHT, [1.0]) == pytest.approx(1.0)
    assert mean("cosine_embedding", LEFT, FAR, [-1.0]) == pytest.approx(3 / math.sqrt(13))


@pytest.mark.parametrize(
    ("name", "options", "near", "far"),
    [
        ("triplet_margin", {}, 2.0, 5.0),
        ("triplet_margin_with_distance", {"distance": "euclidean"}, 2.0, 5.0),
        ("triplet_margin_with_distance", {"distance": "manhattan"}, 2.0, 7.0),
        ("triplet_margin_with_distance", {"distance": "cosine"}, 1 - 3 / math.sqrt(13), 1.0),
    ],
)
def test_an_anchor_nearer_to_the_positive_by_a_margin(
    name: str, options: dict[str, str], near: float, far: float
) -> None:
    assert mean(name, LEFT, FAR, RIGHT, margin=6.0, **options) == (
        pytest.approx(near - far + 6.0, abs=1e-5)
    )
