"""The loader: every row once an epoch, in the sampler's order, whoever asks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.bind import fit_table
from pipeline.data.columns import encode
from pipeline.data.dataset import Dataset, build_dataset
from pipeline.data.loader import Loader, Partition
from pipeline.data.sampler import Sampler, steps_per_epoch
from pipeline.spec.data import Data

NUM_ROWS = 103


def store() -> Dataset:
    numbers = np.arange(NUM_ROWS)
    lists = pa.array([list(range(n % 5)) for n in numbers])
    table = pa.table({"x": numbers.astype(float), "k": numbers % 7, "tokens": lists, "y": numbers})
    data = Data(train="x", target="y", categorical=["k"], scale="none")
    fields = fit_table(data, table, {})
    return build_dataset(fields, encode(fields, table), NUM_ROWS, np.float32)


ROWS = store()


def loader(batch: int, micro: int | None, rank: int, num: int, first: int, last: int) -> Loader:
    def count(batch: Any) -> torch.Tensor:
        return torch.tensor([float(len(batch["y"]))])

    sampler = Sampler(NUM_ROWS, batch, 3)
    return Loader(ROWS, sampler, count, range(first, last), Partition(micro, rank, num))


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 120), micro=st.none() | st.integers(1, 40), num=st.integers(1, 6),
)  # fmt: skip
def test_every_row_comes_once_an_epoch(batch: int, micro: int | None, num: int) -> None:
    steps = steps_per_epoch(NUM_ROWS, batch)
    found: list[int] = []
    for rank in range(num):
        with loader(batch, micro and min(micro, batch), rank, num, 0, steps) as batches:
            for one in batches:
                for _, rows in one.microbatches:
                    found += [int(y) for y in rows["y"]]  # type: ignore[union-attr]
                    assert torch.equal(rows["y"], rows["x"])  # type: ignore[arg-type]
                    tokens: Any = rows["tokens"]
                    assert tokens.lengths.tolist() == [int(y) % 5 for y in rows["y"]]  # type: ignore[union-attr]
                    codes = [int(y) % 7 + 1 for y in rows["y"]]  # type: ignore[union-attr]
                    assert rows["k"].tolist() == codes  # type: ignore[union-attr]
                assert (one.next is None) == (one.step == steps - 1)
                assert sum(map(len, one.counts.values())) == len(one.microbatches)
    assert sorted(found) == list(range(NUM_ROWS))


def test_resuming_at_a_step_gives_the_batches_that_would_have_come() -> None:
    with loader(16, 4, 0, 2, 0, 20) as batches:
        wanted = {b.step: [rows["y"].clone() for _, rows in b.microbatches] for b in batches}  # type: ignore[union-attr]
    with loader(16, 4, 0, 2, 13, 20) as batches:
        for one in batches:
            for (_, rows), y in zip(one.microbatches, wanted[one.step], strict=True):
                assert torch.equal(rows["y"], y)  # type: ignore[arg-type]


def test_an_error_is_raised_where_its_batch_is_needed() -> None:
    def count(batch: Any) -> torch.Tensor:
        if 50.0 in batch["y"]:
            raise ValueError("row 50")
        return torch.zeros(1)

    broken = Loader(ROWS, Sampler(NUM_ROWS, 10, None), count, range(9), Partition())
    done = []

    def load_all() -> None:
        with broken as batches:
            for one in batches:
                done.append(one.step)

    with pytest.raises(ValueError, match="row 50"):
        load_all()
    assert done == [0, 1, 2, 3], "step 4 waits for the counts of the fifth"


def test_a_loader_can_be_left_early() -> None:
    with loader(16, 4, 0, 2, 0, 1000) as batches:
        for one in batches:
            if one.step == 3:
                break
    assert not batches._thread.is_alive()
