"""Rows in memory and in files are the same rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.data.batch import Ragged
from pipeline.data.columns import Category, Number, Tokens, encode
from pipeline.data.dataset import Buffer, Dataset, Writer, build_dataset, open_dataset

FIELDS = [
    Number("a", "double", "input"),
    Category("kind", "string", "input", vocabulary=("x", "y")),
    Tokens("words", "list<int64>", "input", num_classes=8),
    Number("b", "double", "target"),
]
TABLE = pa.table({
    "a": [0.5, 1.5, 2.5, 3.5, 4.5],
    "kind": ["x", "y", "x", "x", "y"],
    "words": pa.array([[1, 2], [], [3], [4, 5, 6], [7]]),
    "b": [10.0, 20.0, 30.0, 40.0, 50.0],
})  # fmt: skip


def in_memory() -> Dataset:
    return build_dataset(FIELDS, encode(FIELDS, TABLE), 5, np.float32)


def in_files(folder: Path, cuts: list[int]) -> Dataset:
    writer = Writer(folder, FIELDS, np.float32)
    for start, end in zip([0, *cuts], [*cuts, 5], strict=True):
        part = TABLE.slice(start, end - start)
        writer.append(encode(FIELDS, part), len(part))
    writer.close()
    assert writer.num_rows == 5
    return open_dataset(folder, FIELDS, np.float32)


@pytest.mark.parametrize("cuts", [[], [2], [0, 1, 1, 4]])
def test_rows_in_files_are_those_in_memory_however_they_were_written(
    cuts: list[int], tmp_path: Path
) -> None:
    memory, files = in_memory(), in_files(tmp_path / "rows", cuts)
    assert files.records.tobytes() == memory.records.tobytes()
    order = np.array([3, 0, 3, 1])
    for one, other in zip(memory.gather(order).values(), files.gather(order).values(), strict=True):
        if isinstance(one, Ragged) and isinstance(other, Ragged):
            assert torch.equal(one.values, other.values)
            assert torch.equal(one.lengths, other.lengths)
        else:
            assert torch.equal(one, other)  # type: ignore[arg-type]


def test_rows_are_gathered_in_the_order_that_is_asked_for() -> None:
    batch = in_memory().gather(np.array([4, 0, 4]))
    assert batch["a"].tolist() == [4.5, 0.5, 4.5]  # type: ignore[union-attr]
    assert batch["kind"].tolist() == [2, 1, 2], "0 is the unknown one"  # type: ignore[union-attr]
    assert batch["words"].values.tolist() == [[7, 0], [1, 2], [7, 0]]  # type: ignore[union-attr]
    assert batch["words"].lengths.tolist() == [1, 2, 1]  # type: ignore[union-attr]


def test_a_buffer_is_used_again() -> None:
    dataset = in_memory()
    buffer = Buffer(dataset.layout, 3)
    first = dataset.gather(np.array([0, 1, 2]), buffer)
    second = dataset.gather(np.array([3]), buffer)
    assert second["b"].tolist() == [40.0]  # type: ignore[union-attr]
    assert first["b"].tolist() == [40.0, 20.0, 30.0], "its life has ended"  # type: ignore[union-attr]


def test_parts_are_all_rows_of_some_columns_in_order() -> None:
    parts = list(in_memory().parts(["b", "words"], size=2))
    assert [part["b"].tolist() for part in parts] == [[10, 20], [30, 40], [50]]  # type: ignore[union-attr]
    assert all(set(part) == {"b", "words"} for part in parts)


def test_files_of_other_columns_are_refused(tmp_path: Path) -> None:
    in_files(tmp_path / "rows", [])
    with pytest.raises(ValueError, match="records of another layout"):
        open_dataset(tmp_path / "rows", FIELDS[:1], np.float32)
    with pytest.raises(ValueError, match="records of another layout"):
        open_dataset(tmp_path / "rows", FIELDS, np.float64)
