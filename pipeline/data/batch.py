"""What a step works on: named columns of the same rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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
Batch = Mapping[str, Column]


@dataclass(frozen=True)
class Slot:
    """Where a column stands: numbers `start` to `start + width` of each row of a matrix."""

    matrix: int
    start: int
    shape: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        """Numbers per row."""
        return math.prod(self.shape)


class Slots(dict[str, Slot]):
    """Slots by the names of their columns; what each step asks of them is computed once."""

    def __init__(self, slots: Mapping[str, Slot]) -> None:
        super().__init__(slots)
        self._only: dict[tuple[str, ...], Slots] = {}
        self._spans: dict[tuple[str, ...], Slot | None] = {}

    def only(self, names: tuple[str, ...]) -> Slots:
        """Those of the named columns."""
        if names not in self._only:
            self._only[names] = Slots({name: self[name] for name in names if name in self})
        return self._only[names]

    def span(self, names: tuple[str, ...]) -> Slot | None:
        """One slot for all the columns, if they follow each other in one matrix."""
        if names not in self._spans:
            self._spans[names] = self._span([self[name] for name in names if name in self], names)
        return self._spans[names]

    @staticmethod
    def _span(slots: list[Slot], names: tuple[str, ...]) -> Slot | None:
        if len(slots) < len(names) or not slots:
            return None
        first = end = slots[0].start
        for slot in slots:
            if slot.matrix != slots[0].matrix or slot.start != end:
                return None
            end += slot.width
        return Slot(slots[0].matrix, first, (end - first,))


class PackedBatch(Mapping[str, Column]):
    """A batch whose columns of one type stand side by side in one matrix [N, width].

    Columns are views of their matrix, so that many of them are moved, or read as one matrix, at the
    price of one. `separate` are the columns that stand alone, such as lists.
    """

    def __init__(
        self, matrices: Sequence[Tensor], slots: Slots, separate: Mapping[str, Column]
    ) -> None:
        self.matrices = list(matrices)
        self.slots = slots
        self.separate = separate

    def __getitem__(self, name: str) -> Column:
        slot = self.slots.get(name)
        if slot is None:
            return self.separate[name]
        matrix = self.matrices[slot.matrix]
        if not slot.shape:
            return matrix[:, slot.start]
        part = matrix[:, slot.start : slot.start + slot.width]
        return part.view(len(matrix), *slot.shape)

    def __iter__(self) -> Iterator[str]:
        yield from self.slots
        yield from self.separate

    def __len__(self) -> int:
        return len(self.slots) + len(self.separate)

    def only(self, names: tuple[str, ...]) -> PackedBatch:
        """The named columns, of the same matrices."""
        separate = (
            {n: self.separate[n] for n in names if n in self.separate} if self.separate else {}
        )
        return PackedBatch(self.matrices, self.slots.only(names), separate)

    def beside(self, names: tuple[str, ...]) -> Tensor | None:
        """The columns as one matrix [N, width] if they follow each other in one matrix."""
        span = self.slots.span(names)
        if span is None:
            return None
        return self.matrices[span.matrix][:, span.start : span.start + span.width]


def num_rows(batch: Batch) -> int:
    """Rows of the batch: the same for each of its columns."""
    if isinstance(batch, PackedBatch) and batch.slots:
        return len(batch.matrices[next(iter(batch.slots.values())).matrix])
    return len(next(iter(batch.values())))


def select(batch: Batch, rows: Tensor) -> Batch:
    """The given rows, lists padded as they are."""
    return _each(batch, lambda tensor: tensor[rows])


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`."""
    if device.type == "cpu":  # where batches are made
        return batch
    return _each(batch, lambda tensor: tensor.to(device, non_blocking=True))


def to_float64(batch: Batch) -> Batch:
    """The batch with its fractions in float64."""
    return _each(batch, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


def only(batch: Batch, names: tuple[str, ...]) -> Batch:
    """The named columns."""
    if isinstance(batch, PackedBatch):
        return batch.only(names)
    return {name: batch[name] for name in names}


def side_by_side(batch: Batch, names: tuple[str, ...]) -> Tensor:
    """The columns as one matrix [N, width], without a copy where they stand so already."""
    matrix = batch.beside(names) if isinstance(batch, PackedBatch) else None
    if matrix is not None:
        return matrix
    parts = []
    for name in names:
        column = batch[name]
        assert isinstance(column, Tensor)
        parts.append(
            column.reshape(column.shape[0], math.prod(column.shape[1:]))
        )  # for torch.export
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _each(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    def changed(column: Column) -> Column:
        if isinstance(column, Ragged):
            return Ragged(change(column.values), change(column.lengths))
        return change(column)

    if isinstance(batch, PackedBatch):
        separate = {name: changed(column) for name, column in batch.separate.items()}
        return PackedBatch([change(matrix) for matrix in batch.matrices], batch.slots, separate)
    return {name: changed(column) for name, column in batch.items()}
