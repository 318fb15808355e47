"""Readings of the machines' load: a file of lines for each worker that takes them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

from pipeline.rundir.journal import format_line, parse_line
from pipeline.rundir.records import Point, SystemReading


def append(path: Path, reading: SystemReading) -> None:
    """Add a line, in one piece."""
    with path.open("ab", buffering=0) as file:
        file.write(format_line(cast(Point, reading)))


class SystemReader:
    """Reads the files of a folder, which may still be written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._offsets: dict[str, int] = {}

    def new(self, until: Mapping[str, int]) -> Iterator[tuple[str, SystemReading]]:
        """Readings since the last call, each with the name of its file.

        Those up to the time, in milliseconds, that `until` has for their file are left out.
        """
        for path in sorted(self._folder.glob("*.jsonl")):
            offset = self._offsets.get(path.name, 0)
            with path.open("rb") as file:
                file.seek(offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    offset += len(line)
                    with contextlib.suppress(ValueError):  # torn, when a disk was full
                        reading = cast(SystemReading, parse_line(line))
                        if reading["time"] > until.get(path.name, -1):
                            yield path.name, reading
            self._offsets[path.name] = offset
