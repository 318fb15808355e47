"""What becomes of a model's buffers when several micro-batches change them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.distributed.buffers import Buffers
from tests.processes import on_workers

START = 4.0


class Watching(nn.Module):
    """Counts rows and their sum, keeps a running mean, the largest number, and a cache."""

    rows: Tensor
    total: Tensor
    average: Tensor
    most: Tensor
    cache: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.register_buffer("rows", torch.tensor(10))
        self.register_buffer("total", torch.tensor(START, dtype=torch.float64))
        self.register_buffer("average", torch.tensor(START, dtype=torch.float64))
        self.register_buffer("most", torch.tensor(3))
        self.register_buffer("idle", torch.tensor(float("nan"), dtype=torch.float64))
        self.register_buffer("cache", torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        self.rows = self.rows + len(x)
        self.total = self.total + x.sum()
        self.average = 0.9 * self.average + 0.1 * x.mean()
        self.most = torch.maximum(self.most, x.max().long())
        self.cache = torch.arange(float(len(x)))
        return x


CHANGING = {"rows": True, "total": True, "average": False, "most": False, "cache": False}
PARTS = [[1.0, 2.0], [9.0], [4.0, 5.0, 6.0]]


def stepped(rank: int, num: int) -> dict[str, Any]:
    """The buffers after one step, whose micro-batches this worker's share is a part of."""
    model = Watching()
    buffers = Buffers(model, CHANGING)
    before = buffers.copy()
    own = PARTS[rank::num]
    sums = torch.zeros(buffers.size, dtype=torch.float64)
    most = model.most
    for part in own:
        buffers.restore(before)
        model(torch.tensor(part, dtype=torch.float64))
        sums += buffers.changes(before)
        most = torch.maximum(most, model.most)
    model.most = most
    if num > 1:
        torch.distributed.all_reduce(sums)
    buffers.apply_changes(before, sums, len(PARTS), has_rows=bool(own))
    return {name: buffer.tolist() for name, buffer in model.named_buffers()}


@pytest.mark.processes
@pytest.mark.parametrize("num", [1, 2, 3, 4])
def test_each_buffer_has_what_all_rows_make_of_it(num: int) -> None:
    for after in [stepped(0, 1)] if num == 1 else on_workers(num, stepped):
        assert after["rows"] == 10 + 6
        assert after["total"] == START + 27
        means = [0.9 * START + 0.1 * sum(part) / len(part) for part in PARTS]
        assert after["average"] == pytest.approx(sum(means) / 3)
        assert after["most"] == 9
        assert after["idle"] != after["idle"], "nan, as it was"


def test_a_buffer_of_another_shape_is_each_workers_own() -> None:
    assert stepped(0, 1)["cache"] == [0, 1, 2], "of the last micro-batch"


def test_restored_buffers_are_those_of_the_copy() -> None:
    model = Watching()
    buffers = Buffers(model, CHANGING)
    before = buffers.copy()
    model(torch.tensor([100.0], dtype=torch.float64, requires_grad=True))
    assert model.average.requires_grad, "a forward pass may leave its graph in a buffer"
    buffers.restore(before)
    assert (model.rows.item(), model.total.item(), model.most.item()) == (10, START, 3)
    assert model.average.item() == START
    assert not model.average.requires_grad
