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

from pipeline.data.batch import Column, PackedBatch, Slot, Slots
from pipeline.data.columns import Encoded, Field, FloatType, Lists, column_errors
from pipeline.data.sampler import Rows


@dataclass(frozen=True)
class Layout:
    """Where each column of one value, or of one shape, stands in a record."""

    record: np.dtype[Any]
    """One array of numbers for each stored type."""
    slots: Slots

    @classmethod
    def of(cls, fields: Iterable[Field], float_dtype: FloatType) -> Layout:
        """Columns of one stored type side by side, inputs first."""
        widths: dict[np.dtype[Any], int] = {}
        starts: dict[str, tuple[np.dtype[Any], int, tuple[int, ...]]] = {}
        for field in fields:
            if field.is_list:
                continue
            dtype = field.dtype(float_dtype)
            starts[field.name] = (dtype, widths.get(dtype, 0), field.shape)
            widths[dtype] = widths.get(dtype, 0) + math.prod(field.shape)
        dtypes = sorted(widths, key=lambda dtype: -dtype.itemsize)
        numbers = [(dtype.name, dtype, (widths[dtype],)) for dtype in dtypes]
        empty = [("nothing", np.dtype(np.int8), (1,))]  # a file of no bytes cannot be mapped
        record = np.dtype(numbers or empty, align=True)
        slots = {
            name: Slot(dtypes.index(dtype), start, shape)
            for name, (dtype, start, shape) in starts.items()
        }
        return cls(record, Slots(slots))

    def packed(self, encoded: Mapping[str, Encoded], num_rows: int) -> NDArray[Any]:
        """Records of some encoded rows."""
        records = np.zeros(num_rows, self.record)
        for name, slot in self.slots.items():
            values = encoded[name]
            assert isinstance(values, np.ndarray)
            matrix = records[self.record.names[slot.matrix]]  # type: ignore[index]
            matrix[:, slot.start : slot.start + slot.width] = values.reshape(num_rows, slot.width)
        return records


@dataclass(frozen=True)
class ListColumn:
    """A list column of all rows: `values` [total], `offsets` int64 [N + 1]."""

    field: Field
    values: NDArray[Any]
    offsets: NDArray[np.int64]
    first: int = 0
    """Index of the first row among all that were not dropped; for messages."""

    def gather(self, rows: Rows) -> Column:
        """The lists of `rows`, padded with 0 to the longest of them; images decoded."""
        starts = self.offsets[rows]
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        where = f"{self.field.where}: column {self.field.name!r}"
        with column_errors(where, lambda row: f"{rows[row] + self.first} of those kept"):
            return self.field.gather(self.values, starts, lengths)


class Buffer:
    """Room for the records of up to `num_rows` rows, to be used again and again."""

    def __init__(self, layout: Layout, num_rows: int, pinned: bool = False) -> None:
        self.layout, self.num_rows = layout, num_rows
        size = num_rows * layout.record.itemsize
        memory = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        self.records = memory.numpy().view(layout.record)
        self._matrices: list[Tensor] = []
        self._codes: list[tuple[NDArray[Any], NDArray[Any]]] = []
        for name in layout.record.names or ():
            stored = self.records[name]
            matrix = torch.from_numpy(stored)
            if not matrix.is_floating_point():
                matrix = torch.empty(stored.shape, dtype=torch.int64, pin_memory=pinned)
                self._codes.append((matrix.numpy(), stored))
            self._matrices.append(matrix)

    def matrices(self, num_rows: int) -> list[Tensor]:
        """The first rows, one matrix for each stored type; codes as int64."""
        for codes, stored in self._codes:  # numpy, which never shares the work among threads
            np.copyto(codes[:num_rows], stored[:num_rows])
        return [matrix[:num_rows] for matrix in self._matrices]


class Dataset:
    """All rows of a split, in memory or in mapped files."""

    def __init__(
        self, layout: Layout, records: NDArray[Any], lists: Mapping[str, ListColumn]
    ) -> None:
        self.layout = layout
        self.records = records
        self.lists = lists
        self._whole = records.view(np.dtype((np.void, layout.record.itemsize)))

    def __len__(self) -> int:
        return len(self.records)

    @contextlib.contextmanager
    def opened(self, run_id: str) -> Iterator[Dataset]:
        """The rows, ready to be gathered; workers of one run give the same `run_id`."""
        yield self

    def expect(self, blocks: list[int]) -> None:
        """Take note of which blocks of rows are used next; here all of them are present."""

    def interrupt(self) -> None:
        """Let threads that wait for rows wait no longer; here none does."""

    def gather(self, rows: Rows | Tensor, buffer: Buffer | None = None) -> PackedBatch:
        """The given rows; with a `buffer` they are views of it, valid until it is used again."""
        rows = np.asarray(rows)
        buffer = buffer or Buffer(self.layout, len(rows))
        into = buffer.records[: len(rows)].view(self._whole.dtype)
        np.take(self._whole, rows, out=into, mode="clip")  # any other mode copies once more
        separate = {name: lists.gather(rows) for name, lists in self.lists.items()}
        return PackedBatch(buffer.matrices(len(rows)), self.layout.slots, separate)

    def parts(self, names: list[str], size: int = 2**16) -> Iterable[PackedBatch]:
        """The named columns of all rows in order, `size` rows at a time."""
        for start in range(0, len(self), size):
            yield self.columns(names, np.arange(start, min(start + size, len(self))))

    def columns(self, names: list[str], rows: Rows) -> PackedBatch:
        """The named columns of the given rows."""
        lists = {name: lists for name, lists in self.lists.items() if name in names}
        return Dataset(self.layout, self.records, lists).gather(rows).only(tuple(names))


def build_dataset(
    fields: list[Field], encoded: Mapping[str, Encoded], num_rows: int, float_dtype: FloatType
) -> Dataset:
    """A dataset in memory, of rows that were encoded together."""
    layout = Layout.of(fields, float_dtype)
    lists = {}
    for field in fields:
        rows = encoded[field.name]
        if isinstance(rows, Lists):
            offsets = np.concatenate([[0], np.cumsum(rows.lengths)])
            lists[field.name] = ListColumn(field, rows.values, offsets)
    return Dataset(layout, layout.packed(encoded, num_rows), lists)


class Writer:
    """Appends encoded rows to the files of a dataset."""

    def __init__(self, folder: Path, fields: list[Field], float_dtype: FloatType) -> None:
        folder.mkdir()
        self.fields = fields
        self.layout = Layout.of(fields, float_dtype)
        self.num_rows = 0
        self._records = _Array(folder / "records.npy", self.layout.record)
        self._lists: dict[str, tuple[_Array, _Array]] = {}
        for index, field in enumerate(fields):
            if field.is_list:
                values = _Array(folder / f"{index}-values.npy", field.dtype(float_dtype))
                offsets = _Array(folder / f"{index}-offsets.npy", np.dtype(np.int64))
                offsets.append(np.zeros(1, np.int64))
                self._lists[field.name] = (values, offsets)

    def append(self, encoded: Mapping[str, Encoded], num_rows: int) -> None:
        """Append rows. Raises OSError when the disk is full."""
        self._records.append(self.layout.packed(encoded, num_rows))
        for name, (values, offsets) in self._lists.items():
            rows = encoded[name]
            assert isinstance(rows, Lists)
            offsets.append(len(values) + np.cumsum(rows.lengths))
            values.append(rows.values)
        self.num_rows += num_rows

    def close(self, to_disk: bool = True) -> None:
        """Complete the files; `to_disk` also makes them outlive a power failure."""
        for array in (self._records, *(a for both in self._lists.values() for a in both)):
            array.close(to_disk)


class _Array:
    """A one-dimensional `.npy` file that grows."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self._dtype, self._length = dtype, 0
        self._file: IO[bytes] = path.open("wb")
        self._header()  # numpy leaves room in it for the length to grow
        self._start = self._file.tell()

    def __len__(self) -> int:
        return self._length

    def append(self, values: NDArray[Any]) -> None:
        self._file.write(np.ascontiguousarray(values, self._dtype).tobytes())
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
            "descr": npy.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self._length,),
        }
        npy.write_array_header_1_0(self._file, described)


def open_dataset(
    folder: Path, fields: list[Field], float_dtype: FloatType, first: int = 0
) -> Dataset:
    """The dataset whose files a `Writer` wrote, of rows from number `first` on.

    Raises ValueError for files that are not those.
    """
    layout = Layout.of(fields, float_dtype)
    records = _map(folder / "records.npy")
    if records.dtype != layout.record:
        raise ValueError(f"{folder}: records of another layout")
    lists = {
        field.name: ListColumn(
            field,
            _map(folder / f"{index}-values.npy"),
            _map(folder / f"{index}-offsets.npy"),
            first,
        )
        for index, field in enumerate(fields)
        if field.is_list
    }
    return Dataset(layout, records, lists)


def _map(path: Path) -> NDArray[Any]:
    array = np.load(path, mmap_mode="r")
    if not len(array):
        return np.empty(0, array.dtype)
    # rows are asked for in no order: reading ahead of them would bring in what nobody wants
    array._mmap.madvise(mmap.MADV_RANDOM)
    return np.asarray(array)
