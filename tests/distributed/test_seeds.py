"""Random numbers follow seed, step and micro-batch, and nothing else."""

from __future__ import annotations

import torch

from pipeline.distributed.seeds import OPTIMIZER, Seeds, seed_for


def test_no_two_places_have_one_seed() -> None:
    places = [(s, step, i) for s in range(4) for step in range(300) for i in range(OPTIMIZER, 16)]
    assert len({seed_for(*place) for place in places}) == len(places)
    assert all(0 <= seed_for(*place) < 2**63 for place in [*places, (2**63 - 1, 10**9, 10**6)])


def test_neighbours_draw_numbers_that_are_not_alike() -> None:
    """Or steps and micro-batches would repeat each other's dropout."""
    seeds = Seeds(0, torch.device("cpu"))
    drawn = []
    for step in range(20):
        for index in range(5):
            seeds.set(step, index)
            drawn.append(torch.randn(1000))
    correlations = torch.corrcoef(torch.stack(drawn)) - torch.eye(len(drawn))
    assert float(correlations.abs().max()) < 0.2, "5 standard deviations and more"


def test_a_micro_batch_draws_the_same_whatever_was_drawn_before() -> None:
    seeds = Seeds(3, torch.device("cpu"))
    seeds.set(7, 2)
    first = torch.rand(4)
    torch.rand(100)
    seeds.set(7, 2)
    assert torch.equal(torch.rand(4), first)
