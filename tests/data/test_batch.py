"""Batches: named columns, lists that are padded, and columns that stand side by side."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.data.batch import (
    Batch,
    PackedBatch,
    Ragged,
    Slot,
    Slots,
    num_rows,
    only,
    select,
    side_by_side,
    to_float64,
)

LISTS = Ragged(
    torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, 0.0]]), torch.tensor([2, 1, 0])
)
SLOTS = {"a": Slot(0, 0), "pair": Slot(0, 1, (2,)), "label": Slot(1, 0), "c": Slot(0, 3)}


def packed() -> PackedBatch:
    numbers = torch.arange(12.0).reshape(3, 4)
    return PackedBatch([numbers, torch.tensor([[7], [8], [9]])], Slots(SLOTS), {"words": LISTS})


def plain() -> Batch:
    return dict(packed().items())


def test_columns_are_views_of_their_block() -> None:
    batch = packed()
    assert list(batch) == ["a", "pair", "label", "c", "words"]
    assert batch["a"].tolist() == [0, 4, 8]  # type: ignore[union-attr]
    assert batch["pair"].tolist() == [[1, 2], [5, 6], [9, 10]]  # type: ignore[union-attr]
    assert batch["label"].tolist() == [7, 8, 9]  # type: ignore[union-attr]
    assert isinstance(batch["pair"], Tensor)
    batch["pair"][0, 0] = 100
    assert batch.matrices[0][0, 1] == 100


def test_a_batch_in_blocks_is_one_of_single_columns() -> None:
    rows = torch.tensor([2, 0])
    for batch in (packed(), plain()):
        assert num_rows(batch) == 3
        chosen = select(batch, rows)
        assert num_rows(chosen) == 2
        assert chosen["c"].tolist() == [11, 3]  # type: ignore[union-attr]
        assert chosen["words"].lengths.tolist() == [0, 2]  # type: ignore[union-attr]
        wide = to_float64(batch)
        assert wide["a"].dtype == torch.float64  # type: ignore[union-attr]
        assert wide["label"].dtype == torch.int64  # type: ignore[union-attr]
        assert list(only(batch, ("label", "words"))) == ["label", "words"]


def test_columns_side_by_side_are_one_matrix_without_a_copy() -> None:
    batch = packed()
    matrix = side_by_side(batch, ("a", "pair"))
    assert matrix.data_ptr() == batch.matrices[0].data_ptr()
    for names in (("a", "pair"), ("pair", "a"), ("c", "a"), ("a",)):
        assert torch.equal(side_by_side(packed(), names), side_by_side(plain(), names)), names


def test_padding_is_told_from_values() -> None:
    assert LISTS.mask.tolist() == [[True, True, False], [True, False, False], [False] * 3]
    assert LISTS.padded(-1).tolist() == [[1, 2, -1], [3, -1, -1], [-1, -1, -1]]
    assert len(LISTS) == 3
