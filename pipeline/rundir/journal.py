"""The curve's journal: one JSON line per step and per evaluation, beside the run's checkpoints.

Each line is a `Point` and ends with the CRC-32 of what stands before it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from pipeline.errors import RunError
from pipeline.files.atomic import named_errors
from pipeline.rundir.records import EvaluationPoint, Event, Numbers, Point, Recomputed, StepPoint

FLUSH_SECONDS = 0.25
RECOMPUTING_SECONDS = 1.0
"""Between events that say how far the recomputation of steps has come."""
UNTIMED = ("rows_per_second",)
"""What is measured anew when a step is recomputed."""
Kind = Literal["train", "validation", "event"]


class Journal:
    """Appends points to a run's journal; each gets its time of writing, in milliseconds.

    A run that resumes from an earlier step recomputes some points. Those in the file keep the time
    of their first writing: a recomputed point is compared with the first where the same bits are
    promised, and not appended. How far that has come, and how it ended, are events.
    """

    def __init__(
        self,
        path: Path,
        check: Callable[[], None] = lambda: None,
        step: int = 0,
        compare: bool = True,
    ) -> None:
        """Open the journal of a run that resumes after `step` steps.

        `check` is called before anything is written, and raises an error where another process has
        taken over.
        """
        self._path = path
        self._check = check
        self._compare = compare
        self._known: dict[tuple[int, Kind], Point] = {}
        self.starts: list[int] = []
        """How many workers each attempt at this run had."""
        self.reached = 0
        """The last step that was ever done."""
        self.bits: dict[str, Any] | None = None
        """What the bits depended on in the last attempt."""
        self.first_difference: int | None = None
        """The first step that gave other numbers when it was recomputed."""
        for point in _points(path):
            if "event" in point:
                if point["event"] == "start":
                    self.starts.append(point["workers"])
                    self.bits = point["bits"]
                elif point["event"] == "recomputed":
                    self.first_difference = self.first_difference or point.get("differs")
            elif point["step"] > step or (point["step"] == step and "validation" in point):
                self._known[key_of(point)] = point
                self.reached = max(self.reached, point["step"])
        self._file = path.open("ab")
        self._lines: list[bytes] = []
        self._flushed = 0.0
        self._told = time.monotonic()
        self._num_recomputed = 0

    def write(self, point: StepPoint | EvaluationPoint) -> None:
        """Append a step or an evaluation, unless it is recomputed."""
        first = self._known.pop(key_of(point), None) if self._known else None
        if first is not None:
            if self._compare and self.first_difference is None and not _is_equal(point, first):
                self.first_difference = point["step"]
            self._note_recomputed(point)
            return
        if "train" in point:
            self._end_recomputation()
        self._append(point)

    def event(self, event: Event) -> None:
        """Append what happened to the run."""
        self._append(event)

    def _append(self, point: Point) -> None:
        now = time.time()
        self._lines.append(line_of(cast(Point, {"time": int(now * 1000), **point})))
        if now - self._flushed > FLUSH_SECONDS or "train" not in point:
            self.flush()
            self._flushed = now

    def _note_recomputed(self, point: StepPoint | EvaluationPoint) -> None:
        """A step or evaluation was recomputed; say now and then how far that is."""
        self._num_recomputed += "train" in point
        if self._num_recomputed and time.monotonic() - self._told >= RECOMPUTING_SECONDS:
            self._told = time.monotonic()
            self.event({"event": "recomputing", "step": point["step"], "reached": self.reached})

    def _end_recomputation(self) -> None:
        """Append how many steps were recomputed, now that all of them are."""
        num_steps, self._num_recomputed = self._num_recomputed, 0
        if not num_steps:
            return
        event: Recomputed = {"event": "recomputed", "step": self.reached, "num_steps": num_steps}
        if self._compare:
            event["differs"] = self.first_difference
        self.event(event)

    def flush(self) -> None:
        """Write all lines to the file, though not yet to the disk.

        Raises RunError if the file was replaced or deleted.
        """
        self._check()
        now = os.stat(self._path) if self._path.exists() else None
        if now is None or not os.path.samestat(os.fstat(self._file.fileno()), now):
            raise RunError(f"{self._path} was replaced or deleted while it was written")
        with named_errors(self._path):
            self._file.write(b"".join(self._lines))
            self._lines.clear()
            self._file.flush()

    def sync(self) -> None:
        """What was flushed outlives a power cut; may be called by another thread."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Everything written is on the disk."""
        self._end_recomputation()
        self.flush()
        self.sync()
        self._file.close()


class Reader:
    """Reads a journal that may still be written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._inode = 0
        self._last: dict[Kind, int] = {}
        self._events: set[bytes] = set()

    def new(self) -> Iterator[Point]:
        """Points and events that were completed since the last call; each point once."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != self._inode:  # repaired: what is left is read once more
                self._offset = 0
            self._inode = inode
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                try:
                    point = read_line(line)
                except ValueError:
                    continue  # damaged: the worker that resumes from it says so
                step, kind = key_of(point)
                if kind == "event":
                    if line in self._events:
                        continue
                    self._events.add(line)
                elif step <= self._last.get(kind, -1):
                    continue  # recomputed, or by a worker that had not noticed its successor
                self._last[kind] = step
                yield point


def events(path: Path) -> Iterator[Event]:
    """What happened to a run; only these lines are parsed, as a journal may be long."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if b'"event": "' not in line:
                continue
            with contextlib.suppress(ValueError):  # torn or damaged
                point = read_line(line)
                if "event" in point:
                    yield point


def line_of(point: Point) -> bytes:
    """A line of the journal."""
    try:
        text = json.dumps(point, allow_nan=False)
    except ValueError:
        text = json.dumps(finite(point))
    content = text.encode()
    return content[:-1] + b', "crc32": "%08x"}\n' % zlib.crc32(content)


def read_line(line: bytes) -> Point:
    """The point of a journal's line. Raises ValueError if it is not what was written."""
    content, _, check = line.rpartition(b', "crc32": "')
    content += b"}"
    if check != b'%08x"}\n' % zlib.crc32(content):
        raise ValueError("a line of the curve is damaged")
    point: Point = json.loads(content)
    return point


def key_of(point: Point) -> tuple[int, Kind]:
    """What tells a point from all others, but for events."""
    if "train" in point:
        return point["step"], "train"
    return point["step"], "validation" if "validation" in point else "event"


def finite(value: Any) -> Any:
    """NaN and infinity as null: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def curve_sha256(points: Sequence[Point]) -> str:
    """SHA-256 over step, loss and each term's loss as float64, in the order of the steps."""
    digest = hashlib.sha256()
    for point in points:
        if "train" in point:
            losses = [point["train"]["loss"], *point["terms"].values()]
            numbers = [math.nan if value is None else value for value in losses]
            digest.update(struct.pack(f"<q{len(numbers)}d", point["step"], *numbers))
    return digest.hexdigest()


def _points(path: Path) -> Iterator[Point]:
    path.touch()
    with path.open("rb") as file:
        for line in file:
            yield read_line(line)


def _is_equal(one: Point, other: Point) -> bool:
    """Whether a recomputation gave the same numbers."""

    def numbers(point: Point) -> list[Numbers]:
        if "train" in point:
            timeless = {k: v for k, v in point["train"].items() if k not in UNTIMED}
            return [timeless, point["terms"]]
        return [point["validation"]] if "validation" in point else []

    return [finite(group) for group in numbers(one)] == [finite(g) for g in numbers(other)]
