"""What a step works on: named tensors of the same rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ragged:
    """Lists of different lengths, padded: `values` [N, L], `lengths` int64 [N]."""

    values: Tensor
    lengths: Tensor

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def mask(self) -> Tensor:
        """True where a value is, False where padding is: bool [N, L]."""
        positions = torch.arange(self.values.shape[1], device=self.values.device)
        return positions < self.lengths[:, None]

    def padded(self, padding: float) -> Tensor:
        """`values` with `padding` beyond each length."""
        return self.values.masked_fill(~self.mask, padding)

    def to(self, device: torch.device) -> Ragged:
        """The same lists on `device`."""
        return Ragged(
            self.values.to(device, non_blocking=True), self.lengths.to(device, non_blocking=True)
        )


Column = Tensor | Ragged
Batch = dict[str, Column]


def num_rows(batch: Batch) -> int:
    """Rows of the batch: the same for each of its columns."""
    return len(next(iter(batch.values())))


def select(batch: Batch, rows: Tensor) -> Batch:
    """The given rows, lists padded as they are."""
    return {
        name: Ragged(column.values[rows], column.lengths[rows])
        if isinstance(column, Ragged)
        else column[rows]
        for name, column in batch.items()
    }


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`."""
    return {
        name: column.to(device)
        if isinstance(column, Ragged)
        else column.to(device, non_blocking=True)
        for name, column in batch.items()
    }
