"""Readings of the machines' load: a file of lines for each worker that takes them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

from pipeline.rundir.journal import format_line, parse_line
from pipeline.rundir.records import Point, SystemReading


def append(path: Path, reading: SystemReading) -> None:
    """Add a line, in one piece; on its own also after one that a full disk cut off."""
    with path.open("ab+", buffering=0) as file:
        is_torn = False
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            is_torn = file.read(1) != b"\n"
        file.write(b"\n" * is_torn + format_line(cast(Point, reading)))


class SystemReader:
    """Reads the files of a folder, which may still be written."""

    def __init__(self, folder: Path, offsets: Mapping[str, int]) -> None:
        """`offsets`: how many bytes of each file have been read before."""
        self._folder = folder
        self._offsets = dict(offsets)

    def new(self) -> Iterator[tuple[str, int, SystemReading]]:
        """Readings since the last call, each with the name of its file and where it ends there.

        Lines that are no readings are left out: nothing depends on them.
        """
        for path in sorted(self._folder.glob("*.jsonl")):
            offset = self._offsets.get(path.name, 0)
            with path.open("rb") as file:
                file.seek(offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    offset += len(line)
                    if reading := _read(line):
                        yield path.name, offset, reading
            self._offsets[path.name] = offset


def _read(line: bytes) -> SystemReading | None:
    try:
        reading = cast(SystemReading, parse_line(line))
        numbers = [reading["time"], reading["step"], reading["node"], *reading["values"].values()]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return reading if all(isinstance(number, int | float) for number in numbers) else None
