"""The curve's journal: one JSON line per step and per evaluation, beside the run's checkpoints.

A point is `{"step", "time", "epoch", "train", "terms"}` or `{"step", "time", "epoch",
"validation"}`; a line with `event` tells what happened to the run in between.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import RunError

FLUSH_SECONDS = 0.25
UNTIMED = ("rows_per_second",)
"""What is measured anew when a step is computed again."""


class Journal:
    """Appends points to `path`; each gets its time of writing, in milliseconds.

    A run that goes on from an earlier step computes some points again. They stand already, with
    the time of their first writing: what is computed again is not appended, but compared with them
    where the same bits are promised.
    """

    def __init__(self, path: Path, step: int = 0, compare: bool = True) -> None:
        self._compare = compare
        self._known: dict[tuple[int, str], dict[str, Any]] = {}
        self.starts: list[int] = []
        """How many workers have started on this run, each time."""
        self.first_difference: int | None = None
        """The first step that gave other numbers when it was computed again."""
        path.touch()
        with path.open("r+b") as file:
            end = 0
            for line in file:
                if not line.endswith(b"\n"):
                    break  # torn when its writer was killed
                end += len(line)
                try:
                    point = json.loads(line)
                except ValueError:
                    raise RunError(f"{path} is damaged at byte {end - len(line)}") from None
                if "event" in point:
                    self.starts += [point["workers"]] if point["event"] == "start" else []
                elif point["step"] > step or (point["step"] == step and "validation" in point):
                    self._known[_key(point)] = point
            file.truncate(end)
        self._file = path.open("a", encoding="utf-8")
        self._flushed = 0.0

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
            return
        now = time.time()
        self._file.write(_line({"time": int(now * 1000), **point}) + "\n")
        if now - self._flushed > FLUSH_SECONDS or "train" not in point:
            self._file.flush()
            self._flushed = now

    def event(self, step: int, event: str, **facts: Any) -> None:
        """Append what happened to the run after `step` steps."""
        self.write({"step": step, "event": event, **facts})

    def flush(self) -> None:
        """What was written is in the file, though not yet on the disk."""
        self._file.flush()

    def to_disk(self) -> None:
        """What was flushed outlives a power cut; may be called by another thread."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Everything written is in the file."""
        self._file.close()


def _key(point: dict[str, Any]) -> tuple[int, str]:
    kind = "train" if "train" in point else "validation" if "validation" in point else "event"
    return point["step"], kind


def _untimed(point: dict[str, Any]) -> Any:
    """The point's numbers that a second computation must give again."""
    groups = {key: point.get(key) for key in ("train", "terms", "validation")}
    return _finite(
        {
            key: {name: value for name, value in (group or {}).items() if name not in UNTIMED}
            for key, group in groups.items()
        }
    )


def _line(point: dict[str, Any]) -> str:
    try:
        return json.dumps(point, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(point))


def _finite(value: Any) -> Any:
    """NaN and infinity as null: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Reader:
    """Reads a journal that may still be written."""

    def __init__(self, path: Path) -> None:
        self.path, self._place = path, 0
        self._last: dict[str, int] = {}

    def new(self) -> Iterator[dict[str, Any]]:
        """Points and events that were completed since the last call; each point once."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._place)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._place += len(line)
                try:
                    point = json.loads(line)
                except ValueError:
                    continue  # damaged: the worker that goes on with it says so
                step, kind = _key(point)
                if kind != "event" and step <= self._last.get(kind, -1):
                    continue  # of a worker that had not noticed yet that others went on
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
