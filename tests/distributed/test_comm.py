"""What workers tell each other, over gloo."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_flatten

from pipeline.distributed import comm
from tests.processes import on_workers

PARTS = {index: torch.from_numpy(np.random.default_rng(index).normal(size=3)) for index in range(7)}
"""Vectors whose sum in float64 depends on the order, in its last bits."""
SUM = torch.stack(list(PARTS.values())).sum(0)
SUM = SUM


def said(rank: int, num: int) -> dict[str, Any]:
    own = {index: part for index, part in PARTS.items() if index % num == rank}
    return {
        "workers": (comm.rank(), comm.num_workers()),
        "sum": comm.all_reduce(torch.tensor([rank + 1, 10 * rank])).tolist(),
        "by index": comm.sum_by_index(own, 7, 3),
        "largest": comm.largest(torch.tensor([rank, -rank])).tolist(),
        "agree": comm.all_agree(torch.tensor([5, rank, -(2**63)])).tolist(),
    }


@pytest.mark.processes
@pytest.mark.parametrize("num", [2, 3, 5])
def test_every_worker_hears_the_same(num: int) -> None:
    for rank, heard in enumerate(on_workers(num, said)):
        assert heard["workers"] == (rank, num)
        assert heard["sum"] == [num * (num + 1) // 2, 10 * num * (num - 1) // 2]
        assert torch.equal(heard["by index"], SUM), "to the bit"
        assert heard["largest"] == [num - 1, 0]
        assert heard["agree"] == [True, False, True]


def test_one_process_needs_no_group() -> None:
    alone = said(0, 1)
    assert alone["workers"] == (0, 1)
    assert torch.equal(alone["by index"], SUM)
    assert alone["agree"] == [True, True, True]


STATE = {
    "step": 3,
    "weights": {
        "a": torch.arange(24.0).reshape(1, 4, 3, 2).to(memory_format=torch.channels_last),
        "b": torch.tensor([1 + 2j, -0.0j]),
        "c": torch.tensor(True),
        "d": torch.arange(6, dtype=torch.bfloat16)[1::2],
        "e": torch.zeros(0, 3),
        "f": torch.eye(3).to_sparse(),
        "g": torch.eye(3).to_sparse_csr(),
    },
    "lists": [torch.tensor([1, 2], dtype=torch.int16), None, ("x", torch.eye(2).t())],
}


def restored(rank: int, num: int) -> Any:
    return comm.tensors_from_first(STATE if rank == 0 else None)


@pytest.mark.processes
@pytest.mark.parametrize("num", [1, 3])
def test_the_first_workers_tensors_arrive_with_their_layout(num: int) -> None:
    for state in on_workers(num, restored):
        leaves, form = tree_flatten(state)
        expected, expected_form = tree_flatten(STATE)
        assert form == expected_form
        for leaf, one in zip(leaves, expected, strict=True):
            if isinstance(one, torch.Tensor):
                assert (leaf.dtype, leaf.shape) == (one.dtype, one.shape)
                assert leaf.layout == one.layout
                if one.layout == torch.strided:
                    assert leaf.clone().stride() == one.clone().stride()
                assert torch.equal(leaf.to_dense(), one.to_dense())
            else:
                assert leaf == one


ROWS = [torch.arange(6.0).reshape(3, 2), torch.zeros(0, 2), torch.tensor([[-0.0, 7.0]])]
MASKS = [torch.tensor([True, False, True]), torch.zeros(0, dtype=torch.bool), torch.tensor([True])]


def gathered(rank: int, num: int) -> list[list[torch.Tensor]]:
    own = {i: [ROWS[i], MASKS[i]] for i in range(3) if i % num == rank}
    return comm.gather_parts(own, 3, torch.device("cpu"))


def gathered_odd(rank: int, num: int) -> str:
    try:
        comm.gather_parts({rank: [torch.zeros(2, rank + 1)]}, num, torch.device("cpu"))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.processes
def test_parts_of_all_workers_stand_in_their_order_on_each() -> None:
    for slots in (gathered(0, 1), *on_workers(2, gathered), *on_workers(5, gathered)):
        for part, expected in zip(slots[0], ROWS, strict=True):
            assert torch.equal(part, expected)
        for part, expected in zip(slots[1], MASKS, strict=True):
            assert part.dtype == torch.bool
            assert torch.equal(part, expected)


@pytest.mark.processes
def test_parts_of_different_shapes_are_refused_on_every_worker() -> None:
    assert all("different shapes" in text for text in on_workers(2, gathered_odd))


def test_an_echo_is_told_from_an_error_of_its_own() -> None:
    assert comm.is_echo(RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:3"))
    assert not comm.is_echo(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not comm.is_echo(OSError("Connection closed by peer"))
