"""The journal of a run where no file can be appended to: in pieces, in an object store.

    curve-000000000000.jsonl    named after the first of its bytes

The last piece grows until it is closed: it is written again, longer. Who wrote them stands in their
names where several attempts write to one place, so that none of them changes another one's.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline.files.store import Store
from pipeline.rundir.journal import LineFilter
from pipeline.rundir.records import Segment

MOST_BYTES = 2**20
"""Of a piece that grows."""


class Pieces:
    """A journal as it is put into a store, piece by piece."""

    def __init__(self, store: Store, pieces: Sequence[Segment] = (), mark: str = "") -> None:
        """`pieces` are there already; `mark` is put into the names of those that are added."""
        self.all = list(pieces)
        self._store, self._mark = store, mark
        self._closed = len(self.all)
        self._lock = threading.Lock()

    def push(self, journal: Path, closes: bool) -> None:
        """Put what was appended to the journal. Raises OSError.

        `closes`: what is appended after that is another piece.
        """
        with self._lock:
            self._push(journal, closes)

    def _push(self, journal: Path, closes: bool) -> None:
        first = sum(piece.bytes for piece in self.all[: self._closed])
        with journal.open("rb") as file:
            file.seek(first)
            content = file.read()
        content = content[: content.rfind(b"\n") + 1]
        if len(content) > sum(piece.bytes for piece in self.all[self._closed :]):
            name = f"curve-{first:012}{self._mark}.jsonl"
            self._store.write(content, name)
            digest = hashlib.sha256(content).hexdigest()
            self.all[self._closed :] = [Segment(name=name, bytes=len(content), sha256=digest)]
        if closes or len(content) > MOST_BYTES:
            self._closed = len(self.all)


def read(store: Store, piece: Segment) -> bytes:
    """A piece's content. Raises ValueError if it is not what it was, and OSError."""
    content = store.read(Path(piece.name).name)[: piece.bytes]
    if hashlib.sha256(content).hexdigest() != piece.sha256:
        raise ValueError(f"{piece.name} is damaged")
    return content


def joined(store: Store, pieces: Iterable[Segment]) -> bytes:
    """The journal out of its pieces. Raises ValueError if one is not what it was, and OSError."""
    return b"".join(read(store, piece) for piece in pieces)


class Follower:
    """Writes a journal that is put into a store to a file here, as far as it has come."""

    def __init__(self, store: Store, journal: Path) -> None:
        """The file may have some of it already, in whole lines."""
        self._store, self._journal = store, journal
        self._seen: list[Segment] = []
        self._filter = LineFilter()
        journal.touch()
        with journal.open("rb") as file:
            for _ in self._filter.new(file):
                pass

    def update(self, pieces: Sequence[Segment]) -> None:
        """Append what is new. Raises OSError, and ValueError for a piece that is damaged."""
        for index, piece in enumerate(pieces):
            before = self._seen[index] if index < len(self._seen) else None
            if piece == before:
                continue
            content = read(self._store, piece)
            is_longer = before is not None and before.name == piece.name
            start = before.bytes if before is not None and is_longer else 0
            lines = content[start:].splitlines(keepends=True)
            with self._journal.open("ab") as file:
                file.writelines(line for line, _ in self._filter.new(lines))
            self._seen[index:] = [piece]
