"""Which rows a step uses: each once an epoch, the same for any number of workers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.sampler import MANY_ROWS, Sampler, WeightedSampler, steps_per_epoch

NUMBERS = st.integers(1, 200)


@given(rows=NUMBERS, batch=NUMBERS, seed=st.none() | st.integers(0, 2**62), epoch=st.integers(0, 3))
def test_every_row_stands_in_exactly_one_step_of_an_epoch(
    rows: int, batch: int, seed: int | None, epoch: int
) -> None:
    steps = steps_per_epoch(rows, batch)
    order = Sampler(rows, batch, seed)
    used = [order.rows(epoch * steps + s) for s in range(steps)]
    assert sorted(np.concatenate(used)) == list(range(rows))
    assert all(len(part) == batch for part in used[:-1])


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    first = Sampler(100, 100, 0).rows(0)
    assert (first == Sampler(100, 100, 0).rows(0)).all()
    assert (first != Sampler(100, 100, 0).rows(1)).any()
    assert (first != Sampler(100, 100, 1).rows(0)).any()
    assert (Sampler(100, 100, None).rows(5) == np.arange(100)).all()


@given(rows=st.integers(1, 700), batch=st.integers(1, 9), seed=st.integers(0, 99))
def test_buckets_hold_rows_of_similar_length_and_every_row_once(
    rows: int, batch: int, seed: int
) -> None:
    lengths = np.random.default_rng(seed).integers(1, 100, rows)
    order, steps = Sampler(rows, batch, seed, lengths), steps_per_epoch(rows, batch)
    used = [order.rows(s) for s in range(steps)]
    assert sorted(np.concatenate(used)) == list(range(rows))
    anew = Sampler(rows, batch, seed, lengths).rows(steps - 1)
    assert (anew == used[-1]).all(), "what was asked for before does not matter"

    def padding(some: list[np.ndarray[Any, Any]]) -> int:
        return sum(len(part) * lengths[part].max() - lengths[part].sum() for part in some)

    mixed = [Sampler(rows, batch, seed).rows(s) for s in range(steps)]
    assert padding(used) <= padding(mixed)


@pytest.mark.parametrize("rows", [MANY_ROWS - 1, MANY_ROWS, MANY_ROWS + 5])
def test_an_order_of_many_rows_is_computed_where_it_is_needed(rows: int) -> None:
    batch = 1000
    order, steps = Sampler(rows, batch, 7), steps_per_epoch(rows, batch)
    used = [order.rows(steps + step) for step in range(steps)]
    assert (np.sort(np.concatenate(used)) == np.arange(rows)).all()
    assert (Sampler(rows, batch, 7).rows(2 * steps - 1) == used[-1]).all()
    assert (used[0] != order.rows(0)).any()
    assert (used[0] != Sampler(rows, batch, 8).rows(steps)).any()
    far = Sampler(10**15, 4, 0)  # 8 PB of them
    found = np.concatenate([far.rows(10**9), far.rows(10**9 + 1)])
    assert len(set(found)) == 8
    assert found.min() >= 0
    assert found.max() < 10**15


def test_batches_of_one_length_among_many_rows_use_every_row_once() -> None:
    rows, batch = MANY_ROWS + 5, 4096
    lengths = np.random.default_rng(0).integers(1, 100, rows)
    order, steps = Sampler(rows, batch, 7, lengths), steps_per_epoch(rows, batch)
    used = [order.rows(step) for step in range(steps)]
    assert (np.sort(np.concatenate(used)) == np.arange(rows)).all()
    assert max(np.ptp(lengths[part]) for part in used[:64]) < 5


def test_rows_as_they_stand_are_no_array_of_all_rows() -> None:
    order = Sampler(10**15, 4, None)  # 8 PB of them
    assert order.rows(10**9).tolist() == [4 * 10**9 + i for i in range(4)]


@given(num=st.integers(1, 300), batch=NUMBERS, draws=st.integers(1, 900), seed=st.integers(0, 99))
def test_drawn_rows_come_as_often_as_their_share_rounded_up_or_down(
    num: int, batch: int, draws: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.random(num) * (rng.random(num) < 0.7)
    weights[rng.integers(num)] = 1.0
    order, steps = WeightedSampler(weights, draws, batch, seed), steps_per_epoch(draws, batch)
    for epoch in range(2):
        used = np.concatenate([order.rows(epoch * steps + step) for step in range(steps)])
        assert len(used) == draws
        counts = np.bincount(used, minlength=num)
        share = weights / weights.sum() * draws
        assert (counts >= np.floor(share - 1e-9)).all()
        assert (counts <= np.ceil(share + 1e-9)).all()
    anew = WeightedSampler(weights, draws, batch, seed)
    assert (anew.rows(2 * steps - 1) == order.rows(2 * steps - 1)).all()


def test_drawn_rows_are_not_in_order_and_another_epoch_has_others() -> None:
    weights = np.ones(1000)
    order = WeightedSampler(weights, 500, 500, 3)
    first, second = order.rows(0), order.rows(1)
    assert set(first) != set(second)
    assert abs(np.corrcoef(first, np.arange(500))[0, 1]) < 0.2
    mixed = WeightedSampler(weights, 1000, 1000, 3).rows(0)
    assert sorted(mixed) == list(range(1000))
    assert (mixed != np.arange(1000)).any()


def test_over_many_epochs_each_row_has_its_share() -> None:
    weights = np.array([1.0, 2.0, 3.0, 4.0])
    order = WeightedSampler(weights, 5, 5, 0)
    counts = sum(np.bincount(order.rows(epoch), minlength=4) for epoch in range(4000))
    assert counts / 20_000 == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.005)


@given(
    counts=st.lists(st.integers(1, 60), min_size=1, max_size=6), draws=st.integers(1, 400),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_balanced_classes_come_equally_often_up_to_one_row(
    counts: list[int], draws: int, seed: int
) -> None:
    classes = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    weights = 1 / np.array(counts)[classes]
    order = WeightedSampler(weights, draws, draws, seed, classes)
    for epoch in range(3):
        rows = order.rows(epoch)
        drawn = np.bincount(classes[rows], minlength=len(counts))
        assert (abs(drawn - draws / len(counts)) < 1 + 1e-9).all()
        share = weights / weights.sum() * draws
        assert (abs(np.bincount(rows, minlength=len(weights)) - share) < 1 + 1e-9).all()
