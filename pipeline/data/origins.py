"""Where each validation row stands in its file, for people who look for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pipeline.data.blocks import Block


@dataclass(frozen=True)
class Origins:
    """File and row of each row of a split."""

    index: NDArray[np.int64]
    """Index of each row over all files: [N]."""
    starts: NDArray[np.int64]
    """Index of each file's first row, in order: [F]."""
    paths: list[str]
    """The files [F]."""

    def find(self, row: int) -> tuple[str, int]:
        """The file that has a row, and the row's index in it, from 0."""
        index = int(self.index[row])
        file = int(np.searchsorted(self.starts, index, "right")) - 1
        return self.paths[file], index - int(self.starts[file])

    @classmethod
    def read(cls, path: Path) -> Origins:
        """What an `OriginWriter` wrote."""
        with np.load(path) as arrays:
            return cls(arrays["index"], arrays["starts"], arrays["paths"].tolist())


@dataclass
class OriginWriter:
    """Collects the origins of rows as their blocks are read, in order."""

    _indices: list[NDArray[np.int64]] = field(default_factory=list)
    _starts: dict[str, int] = field(default_factory=dict)

    def add(self, block: Block, rows: NDArray[np.int64]) -> None:
        """The rows of a block that belong to the split, by their position in it."""
        for piece in block.slices:
            start = block.start + piece.start_in_block - piece.start_in_file
            self._starts.setdefault(piece.path, start)
        self._indices.append(block.start + rows)

    def write(self, path: Path) -> None:
        """All that were added."""
        np.savez(
            path,
            index=np.concatenate(self._indices),
            starts=np.array(list(self._starts.values()), np.int64),
            paths=np.array(list(self._starts)),
        )
