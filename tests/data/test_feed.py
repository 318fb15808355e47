"""The feed: every row once an epoch, in the order's own order, whoever asks."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.columns import encode
from pipeline.data.feed import Feed
from pipeline.data.fitting import fitted
from pipeline.data.order import Order, cut, owned, steps_per_epoch
from pipeline.data.store import Store, in_memory
from pipeline.dataspec import Data

NUM_ROWS = 103


def store() -> Store:
    numbers = np.arange(NUM_ROWS)
    lists = pa.array([list(range(n % 5)) for n in numbers])
    table = pa.table({"x": numbers.astype(float), "k": numbers % 7, "tokens": lists, "y": numbers})
    data = Data(train="x", target="y", categorical=["k"], scale="none")
    fields = fitted(data, table, {})
    return in_memory(fields, encode(fields, table), NUM_ROWS, np.float32)


ROWS = store()


def feed(batch: int, micro: int | None, rank: int, num: int, first: int, last: int) -> Feed:
    order = Order(NUM_ROWS, batch, 3)

    def pieces(step: int) -> list[Any]:
        return cut(order.rows(step), micro, num)

    def count(batch: Any) -> torch.Tensor:
        return torch.tensor([float(len(batch["y"]))])

    return Feed(ROWS, pieces, partial(owned, worker=rank, num_workers=num), count, first, last)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 120), micro=st.none() | st.integers(1, 40), num=st.integers(1, 6),
)  # fmt: skip
def test_every_row_comes_once_an_epoch(batch: int, micro: int | None, num: int) -> None:
    steps = steps_per_epoch(NUM_ROWS, batch)
    found: list[int] = []
    for rank in range(num):
        with feed(batch, micro and min(micro, batch), rank, num, 0, steps) as shares:
            for share, following in shares:
                for _, rows in share.own:
                    found += [int(y) for y in rows["y"]]  # type: ignore[union-attr]
                    assert torch.equal(rows["y"], rows["x"])  # type: ignore[arg-type]
                    tokens: Any = rows["tokens"]
                    assert tokens.lengths.tolist() == [int(y) % 5 for y in rows["y"]]  # type: ignore[union-attr]
                    codes = [int(y) % 7 + 1 for y in rows["y"]]  # type: ignore[union-attr]
                    assert rows["k"].tolist() == codes  # type: ignore[union-attr]
                assert (following is None) == (share.step == steps - 1)
                assert sum(map(len, share.counts.values())) == len(share.own)
    assert sorted(found) == list(range(NUM_ROWS))


def test_going_on_at_a_step_gives_what_would_have_come() -> None:
    with feed(16, 4, 0, 2, 0, 20) as shares:
        wanted = {s.step: [rows["y"].clone() for _, rows in s.own] for s, _ in shares}  # type: ignore[union-attr]
    with feed(16, 4, 0, 2, 13, 20) as shares:
        for share, _ in shares:
            for (_, rows), y in zip(share.own, wanted[share.step], strict=True):
                assert torch.equal(rows["y"], y)  # type: ignore[arg-type]


def test_an_error_comes_where_its_share_would_have() -> None:
    def count(batch: Any) -> torch.Tensor:
        if 50.0 in batch["y"]:
            raise ValueError("row 50")
        return torch.zeros(1)

    broken = Feed(ROWS, lambda step: [np.arange(step * 10, step * 10 + 10)], range, count, 0, 9)
    done = []

    def all_shares() -> None:
        with broken as shares:
            for share, _ in shares:
                done.append(share.step)

    with pytest.raises(ValueError, match="row 50"):
        all_shares()
    assert done == [0, 1, 2, 3], "step 4 waits for the counts of the fifth"


def test_a_feed_can_be_left_early() -> None:
    with feed(16, 4, 0, 2, 0, 1000) as shares:
        for share, _ in shares:
            if share.step == 3:
                break
    assert not shares._thread.is_alive()
