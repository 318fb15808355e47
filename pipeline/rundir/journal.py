"""The curve's journal: one JSON line per step and per evaluation, beside the run's checkpoints.

Each line is a `Point` and ends with the CRC-32 of what stands before it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import struct
import time
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal, cast

from pipeline.errors import RunError
from pipeline.files.atomic import named_errors
from pipeline.rundir.records import EvaluationPoint, Event, Numbers, Point, Recomputed, StepPoint

FLUSH_SECONDS = 0.25
PROGRESS_EVENT_SECONDS = 1.0
"""Seconds between events that report the progress of a recomputation."""
EVENT = b'"event": "'
STEP_POINT = re.compile(rb'\{"time": \d+, "step": (\d+), "epoch": [^,]+, "terms"')
"""How the line of a step begins."""
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
        taken over. `compare` says whether recomputed points must equal the first ones. Raises
        ValueError for a damaged line; `repair` cuts it off.
        """
        self._path = path
        self._check = check
        self._compare = compare
        self._to_recompute: dict[tuple[int, Kind], Point] = {}
        self.workers_by_attempt: list[int] = []
        """How many workers each attempt at this run had."""
        self.reached = 0
        """The last step in the journal as it was opened."""
        self.bits: dict[str, Any] | None = None
        """What the bits depended on in the last attempt."""
        self.baselines: Numbers = {}
        """The metrics that a constant prediction has."""
        self.first_difference: int | None = None
        """The first step that gave other numbers when it was recomputed."""
        path.touch()
        for point in _points(path, step):
            if "event" in point:
                if point["event"] == "start":
                    self.workers_by_attempt.append(point["workers"])
                    self.bits = point["bits"]
                elif point["event"] == "recomputed" and self.first_difference is None:
                    self.first_difference = point.get("differs")
                continue
            self.reached = max(self.reached, point["step"])
            if "validation" in point:
                self.baselines = point.get("baselines", self.baselines)
            if point["step"] > step or (point["step"] == step and "validation" in point):
                self._to_recompute[key_of(point)] = point
        self._file = path.open("ab")
        self._lines: list[bytes] = []
        self._last_flush = 0.0
        self._last_progress_event = time.monotonic()
        self._num_recomputed = self._last_recomputed = 0
        self._is_difference_written = True

    def write(self, point: StepPoint | EvaluationPoint) -> Point:
        """Append a step or an evaluation, unless it is recomputed; what the curve has of it."""
        first = self._to_recompute.pop(key_of(point), None) if self._to_recompute else None
        if first is not None:
            self._recompute(point, first)
            return first
        if "train" in point:
            self._end_recomputation()
        else:
            self.baselines = point.get("baselines", self.baselines)
        self._append(point)
        return point

    def event(self, event: Event) -> None:
        """Append what happened to the run."""
        self._append(event)

    def _append(self, point: Point) -> None:
        self._lines.append(format_line(cast(Point, {"time": int(time.time() * 1000), **point})))
        if time.monotonic() - self._last_flush > FLUSH_SECONDS or "train" not in point:
            self.flush()
            self._last_flush = time.monotonic()

    def _recompute(self, point: StepPoint | EvaluationPoint, first: Point) -> None:
        """Compare a point with the first of its kind; report now and then how far that has come."""
        step = self._last_recomputed = point["step"]
        self._num_recomputed += "train" in point
        if self._compare and self.first_difference is None and not _is_equal(point, first):
            self.first_difference = step
            self._is_difference_written = False
        now = time.monotonic()
        if self._num_recomputed and now - self._last_progress_event >= PROGRESS_EVENT_SECONDS:
            self._last_progress_event = now
            self.event({"event": "recomputing", "step": step, "reached": self.reached})

    def _end_recomputation(self) -> None:
        """Append how many steps were recomputed: all that had to be, or the run stops."""
        if not self._num_recomputed and self._is_difference_written:
            return
        event: Recomputed = {
            "event": "recomputed",
            "step": self._last_recomputed,
            "num_steps": self._num_recomputed,
        }
        if self._compare:
            event["differs"] = self.first_difference
        self.event(event)
        self._num_recomputed = 0
        self._is_difference_written = True

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
        """Put what was flushed on the disk (fsync); may be called by another thread."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write everything to the disk and close the file."""
        self._end_recomputation()
        self.flush()
        self.sync()
        self._file.close()


class LineFilter:
    """Tells the lines of a journal that are read for the first time."""

    def __init__(self) -> None:
        self._last: dict[Kind, int] = {}
        self._events: set[bytes] = set()

    def new(self, lines: Iterable[bytes]) -> Iterator[tuple[bytes, Point]]:
        """Those that hold what no line before them has held, with what they hold."""
        for line in lines:
            try:
                point = parse_line(line)
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
            yield line, point


class Reader:
    """Reads a journal that may still be written: all of it, or the events alone, much faster."""

    def __init__(self, path: Path, only_events: bool = False) -> None:
        self.path = path
        self._only_events = only_events
        self._offset = 0
        self._file: IO[bytes] | None = None
        self.num_files = 0
        """How many the journal has been: a repair makes another one."""
        self._filter = LineFilter()

    def new(self) -> Iterator[Point]:
        """Points and events that were completed since the last call; each point once."""
        if not self.path.exists():
            return
        file = self._open()
        file.seek(self._offset)
        for _, point in self._filter.new(self._completed(file)):
            yield point

    def _completed(self, file: IO[bytes]) -> Iterator[bytes]:
        for line in file:
            if not line.endswith(b"\n"):
                return
            self._offset += len(line)
            if not self._only_events or EVENT in line:
                yield line

    def _open(self) -> IO[bytes]:
        """The file, which a repair may have replaced: what is left is read once more.

        It stays open, as the next one could get its inode.
        """
        if self._file is None or not os.path.samestat(
            os.fstat(self._file.fileno()), os.stat(self.path)
        ):
            if self._file is not None:
                self._file.close()
            self._file = self.path.open("rb")
            weakref.finalize(self, self._file.close)
            self._offset = 0
            self.num_files += 1
        return self._file


def events(reader: Reader) -> Iterator[Event]:
    """What has happened to a run since the reader's last look."""
    yield from (point for point in reader.new() if "event" in point)


def points_at(path: Path, step: int) -> list[Point]:
    """The step and the evaluation after `step` steps; only these lines are parsed."""
    wanted = b'"step": %d,' % step
    found: dict[Kind, Point] = {}
    with path.open("rb") as file:
        for line in file:
            if wanted not in line:
                continue
            with contextlib.suppress(ValueError):  # torn or damaged
                point = parse_line(line)
                if "event" not in point and point["step"] == step:
                    found.setdefault(key_of(point)[1], point)
    return list(found.values())


def format_line(point: Point) -> bytes:
    """A line of the journal."""
    try:
        text = json.dumps(point, allow_nan=False)
    except ValueError:
        text = json.dumps(nonfinite_to_none(point))
    content = text.encode()
    return content[:-1] + b', "crc32": "%08x"}\n' % zlib.crc32(content)


def parse_line(line: bytes) -> Point:
    """The point of a journal's line. Raises ValueError if the line is damaged."""
    point: Point = json.loads(_content(line))
    return point


def key_of_line(line: bytes) -> tuple[int, Kind]:
    """`key_of` a journal's line, much faster. Raises ValueError if the line is damaged."""
    content = _content(line)
    if match := STEP_POINT.match(content):
        return int(match[1]), "train"
    return key_of(json.loads(content))


def _content(line: bytes) -> bytes:
    """A line's JSON object, without its checksum. Raises ValueError if the line is damaged."""
    content, _, check = line.rpartition(b', "crc32": "')
    content += b"}"
    if check != b'%08x"}\n' % zlib.crc32(content):
        raise ValueError("a line of the curve is damaged")
    return content


def key_of(point: Point) -> tuple[int, Kind]:
    """Step and kind: no two points share them, but for events."""
    if "train" in point:
        return point["step"], "train"
    return point["step"], "validation" if "validation" in point else "event"


def nonfinite_to_none(value: Any) -> Any:
    """Replace NaN and infinity, which JSON lacks, with None."""
    if isinstance(value, dict):
        return {key: nonfinite_to_none(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class CurveDigest:
    """SHA-256 over step, loss and each term's loss as float64, in the order of the steps."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, point: Point) -> None:
        """Take in the next point; only steps count."""
        if "train" in point:
            losses = [point["train"]["loss"], *point["terms"].values()]
            numbers = [math.nan if value is None else value for value in losses]
            self._digest.update(struct.pack(f"<q{len(numbers)}d", point["step"], *numbers))

    def hexdigest(self) -> str:
        """Of the points so far."""
        return self._digest.hexdigest()


def curve_sha256(points: Sequence[Point]) -> str:
    """The digest of these points."""
    digest = CurveDigest()
    for point in points:
        digest.add(point)
    return digest.hexdigest()


def _points(path: Path, step: int) -> Iterator[Point]:
    """All points, but of those of steps up to `step` the last one only: a journal may be long."""
    last = b""
    with path.open("rb") as file:
        for line in file:
            match = STEP_POINT.match(line)
            if match and int(match[1]) <= step:
                last = line
            else:
                yield parse_line(line)
    if last:
        yield parse_line(last)


def _is_equal(one: Point, other: Point) -> bool:
    """Whether a recomputation gave the same numbers."""

    def numbers(point: Point) -> list[Numbers]:
        if "train" in point:
            return [point["train"], point["terms"]]
        return [point["validation"]] if "validation" in point else []

    return [nonfinite_to_none(group) for group in numbers(one)] == [
        nonfinite_to_none(g) for g in numbers(other)
    ]
