"""The curve's journal: one JSON line per step and per evaluation, beside the run's checkpoints.

A point is `{"step", "time", "epoch", "train", "terms"}` or `{"step", "time", "epoch",
"validation"}`; a line with `event` tells what happened to the run in between. Each line ends with
the CRC-32 of what stands before it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import RunError
from pipeline.train.files import naming, replacing

FLUSH_SECONDS = 0.25
AGAIN_SECONDS = 1.0
"""Between words of where the steps are that are computed again."""
UNTIMED = ("rows_per_second",)
"""What is measured anew when a step is computed again."""


class Journal:
    """Appends points to `path`; each gets its time of writing, in milliseconds.

    A run that goes on from an earlier step computes some points again. They stand already, with
    the time of their first writing: what is computed again is not appended, but compared with them
    where the same bits are promised; the event `again` says how far it has come, and how many they
    were. `may_write` is called before anything is written, and raises
    an error where another process has taken over.
    """

    def __init__(
        self, path: Path, step: int = 0, compare: bool = True,
        may_write: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._path, self._compare, self._may_write = path, compare, may_write
        self._known: dict[tuple[int, str], dict[str, Any]] = {}
        self.starts: list[int] = []
        """How many workers have started on this run, each time."""
        self.reached = 0
        """The last step that was ever done."""
        self.bits: dict[str, Any] | None = None
        """What the bits depended on at the last start."""
        self.first_difference: int | None = None
        """The first step that gave other numbers when it was computed again."""
        path.touch()
        with path.open("rb") as file:
            for line in file:
                point = read(line)
                if "event" in point:
                    if point["event"] == "start":
                        self.starts.append(point["workers"])
                        self.bits = point["bits"]
                    self.first_difference = self.first_difference or point.get("differs")
                elif point["step"] > step or (point["step"] == step and "validation" in point):
                    self._known[_key(point)] = point
                    self.reached = max(self.reached, point["step"])
        self._file = path.open("ab")
        self._lines: list[bytes] = []
        self._flushed, self._said = 0.0, time.monotonic()
        self._num_again = 0

    def write(self, point: dict[str, Any]) -> None:
        """Append one point: `step` and either `train` or `validation` values by name."""
        known = self._known.pop(_key(point), None) if self._known else None
        if known is not None:
            if (
                self._compare
                and self.first_difference is None
                and _untimed(point) != _untimed(known)
            ):
                self.first_difference = point["step"]
            self._again(point)
            return
        if "train" in point:
            self._caught_up()
        now = time.time()
        self._lines.append(line_of({"time": int(now * 1000), **point}))
        if now - self._flushed > FLUSH_SECONDS or "train" not in point:
            self.flush()
            self._flushed = now

    def _again(self, point: dict[str, Any]) -> None:
        """A step or evaluation was computed again; say now and then how far that is."""
        self._num_again += "train" in point
        if self._num_again and time.monotonic() - self._said >= AGAIN_SECONDS:
            self._said = time.monotonic()
            self.event(point["step"], "again", reached=self.reached)

    def _caught_up(self) -> None:
        """All that was done before the failure has been computed again."""
        number, self._num_again = self._num_again, 0
        if not number:
            return
        facts = {"differs": self.first_difference} if self._compare else {}
        self.event(self.reached, "again", num_steps=number, **facts)

    def event(self, step: int, event: str, **facts: Any) -> None:
        """Append what happened to the run after `step` steps."""
        self.write({"step": step, "event": event, **facts})

    def flush(self) -> None:
        """What was written is in the file, though not yet on the disk."""
        self._may_write()
        place = os.stat(self._path) if self._path.exists() else None
        if place is None or not os.path.samestat(os.fstat(self._file.fileno()), place):
            raise RunError(f"{self._path} was replaced or deleted while it was written")
        with naming(self._path):
            self._file.write(b"".join(self._lines))
            self._lines.clear()
            self._file.flush()

    def to_disk(self) -> None:
        """What was flushed outlives a power cut; may be called by another thread."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Everything written is on the disk."""
        self._caught_up()
        self.flush()
        self.to_disk()
        self._file.close()


def line_of(point: dict[str, Any]) -> bytes:
    """A line of the journal."""
    try:
        text = json.dumps(point, allow_nan=False)
    except ValueError:
        text = json.dumps(finite(point))
    content = text.encode()
    return content[:-1] + b', "crc32": "%08x"}\n' % zlib.crc32(content)


def read(line: bytes) -> dict[str, Any]:
    """The point of a journal's line. Raises ValueError if it is not what was written."""
    content, _, check = line.rpartition(b', "crc32": "')
    content += b"}"
    if check != b'%08x"}\n' % zlib.crc32(content):
        raise ValueError("a line of the curve is damaged")
    point: dict[str, Any] = json.loads(content)
    return point


def repair(
    path: Path, is_evaluated: Callable[[int], bool] = lambda _: False,
    may_write: Callable[[], None] = lambda: None,
) -> tuple[int, str]:  # fmt: skip
    """Put a copy of what is whole in the journal's place; the steps it holds, and what was damaged.

    It ends before the first line that is damaged, or that follows a gap: each step is there, and
    an evaluation of those for which `is_evaluated`. A line that was torn when its writer was killed
    is left out; anything else is kept in a file beside the journal. An earlier attempt that wakes
    up has the old file open, which nobody reads any more. `may_write` is as for a Journal.
    """
    path.touch()
    last = {"train": 0, "validation": -1}
    rest, said = b"", ""

    def num_whole() -> int:
        """Steps that are there, with their evaluation."""
        step = last["train"]
        return step - (is_evaluated(step) and last["validation"] < step)

    with path.open("rb") as file, replacing(path, may_write) as copy:
        for line in file:
            try:
                step, kind = _key(read(line))
            except ValueError:
                rest = line + file.read()
                break
            most = max(last["train"], num_whole() + (kind == "train"))
            if kind in last and step > most:
                rest = line + file.read()
                break
            copy.write(line)
            if kind in last:
                last[kind] = max(last[kind], step)
        if b"\n" in rest:
            kept = path.with_name(f"{path.stem}.damaged-{int(time.time())}{path.suffix}")
            kept.write_bytes(rest)
            said = (
                f"{path.name} is damaged after step {last['train']}: what follows is computed "
                f"again (the old is kept as {kept.name})"
            )
    return num_whole(), said


def _key(point: dict[str, Any]) -> tuple[int, str]:
    kind = "train" if "train" in point else "validation" if "validation" in point else "event"
    return point["step"], kind


def _untimed(point: dict[str, Any]) -> Any:
    """The point's numbers that a second computation must give again."""
    groups = {key: point.get(key) for key in ("train", "terms", "validation")}
    return finite(
        {
            key: {name: value for name, value in (group or {}).items() if name not in UNTIMED}
            for key, group in groups.items()
        }
    )


def finite(value: Any) -> Any:
    """NaN and infinity as null: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Reader:
    """Reads a journal that may still be written."""

    def __init__(self, path: Path) -> None:
        self.path, self._place, self._file = path, 0, 0
        self._last: dict[str, int] = {}
        self._events: set[bytes] = set()

    def new(self) -> Iterator[dict[str, Any]]:
        """Points and events that were completed since the last call; each point once."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            number = os.fstat(file.fileno()).st_ino
            if number != self._file:  # mended: read once more what is left
                self._place = 0
            self._file = number
            file.seek(self._place)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._place += len(line)
                try:
                    point = read(line)
                except ValueError:
                    continue  # damaged: the worker that goes on with it says so
                step, kind = _key(point)
                if kind == "event":
                    if line in self._events:
                        continue
                    self._events.add(line)
                elif step <= self._last.get(kind, -1):
                    continue  # computed again, or by a worker that had not noticed its successor
                self._last[kind] = step
                yield point


def curve_sha256(points: list[dict[str, Any]]) -> str:
    """SHA-256 over step, loss and each term's loss as float64, in the order of the steps."""
    digest = hashlib.sha256()
    for point in points:
        if "train" in point:
            losses = [point["train"]["loss"], *point["terms"].values()]
            numbers = [math.nan if value is None else value for value in losses]
            digest.update(struct.pack(f"<q{len(numbers)}d", point["step"], *numbers))
    return digest.hexdigest()
