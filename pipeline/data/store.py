"""Rows as the steps read them: one record of fixed size for each, lists beside them.

A record holds all numbers and codes of its row side by side, so that a row of any number of columns
is gathered by one copy. In files, records and lists are plain arrays (`.npy`) mapped into memory:
the address of a row is a multiplication, and what is not used takes no memory.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.batch import Blocks, Column, Ragged, Slot, Slots
from pipeline.data.columns import Encoded, Field, Pieces, decoded, stored_type
from pipeline.data.sampler import Rows
from pipeline.errors import DataError

Fraction = type[np.floating[Any]]


@dataclass(frozen=True)
class Layout:
    """Where each column of one value, or of one shape, stands in a record."""

    record: np.dtype[Any]
    """One array of numbers for each stored type."""
    slots: Slots

    @classmethod
    def of(cls, fields: Iterable[Field], fraction: Fraction) -> Layout:
        """Columns of one stored type side by side, inputs first."""
        widths: dict[np.dtype[Any], int] = {}
        starts: dict[str, tuple[np.dtype[Any], int, tuple[int, ...]]] = {}
        for field in fields:
            if field.is_list:
                continue
            kind = stored_type(field, fraction)
            starts[field.name] = (kind, widths.get(kind, 0), field.shape)
            widths[kind] = widths.get(kind, 0) + math.prod(field.shape)
        kinds = sorted(widths, key=lambda kind: -kind.itemsize)
        numbers = [(kind.name, kind, (widths[kind],)) for kind in kinds]
        empty = [("nothing", np.dtype(np.int8), (1,))]  # a file of no bytes cannot be mapped
        record = np.dtype(numbers or empty, align=True)
        slots = {
            name: Slot(kinds.index(kind), start, shape)
            for name, (kind, start, shape) in starts.items()
        }
        return cls(record, Slots(slots))

    def packed(self, encoded: Mapping[str, Encoded], num_rows: int) -> NDArray[Any]:
        """Records of some encoded rows."""
        made = np.zeros(num_rows, self.record)
        for name, slot in self.slots.items():
            values = encoded[name]
            assert isinstance(values, np.ndarray)
            block = made[self.record.names[slot.block]]  # type: ignore[index]
            block[:, slot.start : slot.start + slot.width] = values.reshape(num_rows, slot.width)
        return made


@dataclass(frozen=True)
class Lists:
    """A list column of all rows: `values` [total], `offsets` int64 [N + 1]."""

    field: Field
    values: NDArray[Any]
    offsets: NDArray[np.int64]
    first: int = 0
    """Number of the first row among all that are kept; for messages."""

    def gather(self, rows: Rows) -> Column:
        """The lists of `rows`, padded with 0 to the longest of them; images decoded."""
        starts, lengths = self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows]
        if self.field.kind == "image":
            return self._images(rows, starts, lengths)
        kind = self.values.dtype if self.field.kind == "series" else np.dtype(np.int64)
        made = np.zeros((len(rows), int(lengths.max(initial=0))), kind)
        ends = np.cumsum(lengths)
        places = np.arange(ends[-1] if len(ends) else 0) + np.repeat(
            starts - (ends - lengths), lengths
        )
        made[np.arange(made.shape[1]) < lengths[:, None]] = self.values[places]
        return Ragged(torch.from_numpy(made), torch.from_numpy(lengths))

    def _images(self, rows: Rows, starts: Rows, lengths: Rows) -> Tensor:
        made = torch.empty(len(rows), *self.field.shape)
        for number, (row, start, length) in enumerate(zip(rows, starts, lengths, strict=True)):
            try:
                image = decoded(self.field, self.values[start : start + length])
            except ValueError as error:
                number = row + self.first
                where = f"data.inputs: column {self.field.name!r}, row {number} of those kept"
                raise DataError(f"{where}: {error}") from None
            made[number] = torch.from_numpy(image)
        return made


class Buffer:
    """Room for the records of up to `num_rows` rows, to be used again and again."""

    def __init__(self, layout: Layout, num_rows: int, pinned: bool = False) -> None:
        self.layout, self.num_rows = layout, num_rows
        size = num_rows * layout.record.itemsize
        memory = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        self.records = memory.numpy().view(layout.record)
        self._blocks: list[Tensor] = []
        self._codes: list[tuple[NDArray[Any], NDArray[Any]]] = []
        for name in layout.record.names or ():
            stored = self.records[name]
            block = torch.from_numpy(stored)
            if not block.is_floating_point():
                block = torch.empty(stored.shape, dtype=torch.int64, pin_memory=pinned)
                self._codes.append((block.numpy(), stored))
            self._blocks.append(block)

    def blocks(self, num_rows: int) -> list[Tensor]:
        """The first rows, one block for each stored type; codes as int64."""
        for codes, stored in self._codes:  # numpy, which never shares the work among threads
            np.copyto(codes[:num_rows], stored[:num_rows])
        return [block[:num_rows] for block in self._blocks]


class Store:
    """All rows of a split, in memory or in mapped files."""

    def __init__(self, layout: Layout, records: NDArray[Any], lists: Mapping[str, Lists]) -> None:
        self.layout, self.records, self.lists = layout, records, lists
        self._whole = records.view(np.dtype((np.void, layout.record.itemsize)))

    def __len__(self) -> int:
        return len(self.records)

    @contextlib.contextmanager
    def opened(self, run: str) -> Iterator[Store]:
        """The rows while a run uses them, which may have to fetch them."""
        yield self

    def expect(self, blocks: list[int]) -> None:
        """Told which blocks of rows will be used next; here all of them are at hand."""

    def interrupt(self) -> None:
        """Whoever waits for rows is to wait no longer."""

    def gather(self, rows: Rows | Tensor, buffer: Buffer | None = None) -> Blocks:
        """The given rows, in `buffer` if there is one; its next use ends the life of the batch."""
        rows = np.asarray(rows)
        buffer = buffer or Buffer(self.layout, len(rows))
        into = buffer.records[: len(rows)].view(self._whole.dtype)
        np.take(self._whole, rows, out=into, mode="clip")  # any other mode copies once more
        apart = {name: lists.gather(rows) for name, lists in self.lists.items()}
        return Blocks(buffer.blocks(len(rows)), self.layout.slots, apart)

    def parts(self, names: list[str], size: int = 2**16) -> Iterable[Blocks]:
        """The named columns of all rows in order, `size` rows at a time."""
        lists = {name: lists for name, lists in self.lists.items() if name in names}
        some = Store(self.layout, self.records, lists)
        for start in range(0, len(self), size):
            yield some.gather(np.arange(start, min(start + size, len(self)))).only(tuple(names))


def in_memory(
    fields: list[Field], encoded: Mapping[str, Encoded], num_rows: int, fraction: Fraction
) -> Store:
    """A store of rows that were encoded together."""
    layout = Layout.of(fields, fraction)
    lists = {}
    for field in fields:
        pieces = encoded[field.name]
        if isinstance(pieces, Pieces):
            offsets = np.concatenate([[0], np.cumsum(pieces.lengths)])
            lists[field.name] = Lists(field, pieces.values, offsets)
    return Store(layout, layout.packed(encoded, num_rows), lists)


class Writer:
    """Appends encoded rows to the files of a store."""

    def __init__(self, folder: Path, fields: list[Field], fraction: Fraction) -> None:
        folder.mkdir()
        self.fields, self.layout, self.num_rows = fields, Layout.of(fields, fraction), 0
        self._records = _Array(folder / "records.npy", self.layout.record)
        self._lists: dict[str, tuple[_Array, _Array]] = {}
        for number, field in enumerate(fields):
            if field.is_list:
                values = _Array(folder / f"{number}-values.npy", stored_type(field, fraction))
                offsets = _Array(folder / f"{number}-offsets.npy", np.dtype(np.int64))
                offsets.append(np.zeros(1, np.int64))
                self._lists[field.name] = (values, offsets)

    def append(self, encoded: Mapping[str, Encoded], num_rows: int) -> None:
        """Append rows. Raises OSError when the disk is full."""
        self._records.append(self.layout.packed(encoded, num_rows))
        for name, (values, offsets) in self._lists.items():
            pieces = encoded[name]
            assert isinstance(pieces, Pieces)
            offsets.append(len(values) + np.cumsum(pieces.lengths))
            values.append(pieces.values)
        self.num_rows += num_rows

    def close(self, to_disk: bool = True) -> None:
        """The files are whole, and on the disk too unless they need not outlive the machine."""
        for array in (self._records, *(a for both in self._lists.values() for a in both)):
            array.close(to_disk)


class _Array:
    """A one-dimensional `.npy` file that grows."""

    def __init__(self, path: Path, kind: np.dtype[Any]) -> None:
        self._kind, self._length = kind, 0
        self._file: IO[bytes] = path.open("wb")
        self._header()  # numpy leaves room in it for the length to grow
        self._start = self._file.tell()

    def __len__(self) -> int:
        return self._length

    def append(self, values: NDArray[Any]) -> None:
        self._file.write(np.ascontiguousarray(values, self._kind).tobytes())
        self._length += len(values)

    def close(self, to_disk: bool) -> None:
        self._file.seek(0)
        self._header()
        assert self._file.tell() == self._start
        self._file.flush()
        if to_disk:
            os.fsync(self._file.fileno())
        self._file.close()

    def _header(self) -> None:
        described = {
            "descr": npy.dtype_to_descr(self._kind),
            "fortran_order": False, "shape": (self._length,),
        }  # fmt: skip
        npy.write_array_header_1_0(self._file, described)


def mapped(folder: Path, fields: list[Field], fraction: Fraction, first: int = 0) -> Store:
    """The store whose files a `Writer` wrote, of rows from number `first` on.

    Raises ValueError for files that are not those.
    """
    layout = Layout.of(fields, fraction)
    records = _map(folder / "records.npy")
    if records.dtype != layout.record:
        raise ValueError(f"{folder}: records of another layout")
    lists = {
        field.name: Lists(
            field,
            _map(folder / f"{number}-values.npy"),
            _map(folder / f"{number}-offsets.npy"),
            first,
        )
        for number, field in enumerate(fields)
        if field.is_list
    }
    return Store(layout, records, lists)


def _map(path: Path) -> NDArray[Any]:
    found = np.load(path, mmap_mode="r")
    if not len(found):
        return np.empty(0, found.dtype)
    # rows are asked for in no order: reading ahead of them would bring in what nobody wants
    found._mmap.madvise(mmap.MADV_RANDOM)
    return np.asarray(found)
