"""The curve's journal: one JSON line per step and per evaluation, beside the run's weights."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FLUSH_SECONDS = 0.25


class Journal:
    """Appends points to `path`; each gets its time of writing, in milliseconds."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")
        self._flushed = 0.0

    def write(self, point: dict[str, Any]) -> None:
        """Append one point: `step` and either `train` or `validation` values by name."""
        now = time.time()
        values = {"time": int(now * 1000), **_finite(point)}
        self._file.write(json.dumps(values) + "\n")
        if now - self._flushed > FLUSH_SECONDS or "validation" in point:
            self._file.flush()
            self._flushed = now

    def close(self) -> None:
        """Everything written is in the file."""
        self._file.close()


def _finite(value: Any) -> Any:
    """NaN and infinity as null: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Reader:
    """Reads a journal that may still be written."""

    def __init__(self, path: Path) -> None:
        self.path, self._place = path, 0

    def new(self) -> Iterator[dict[str, Any]]:
        """Points that were completed since the last call."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._place)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._place += len(line)
                yield json.loads(line)


def curve_sha256(points: list[dict[str, Any]]) -> str:
    """SHA-256 over step, loss and each term's loss as float64, in the order of the steps."""
    digest = hashlib.sha256()
    for point in points:
        if "train" in point:
            losses = [point["train"]["loss"], *point["terms"].values()]
            numbers = [math.nan if value is None else value for value in losses]
            digest.update(struct.pack(f"<q{len(numbers)}d", point["step"], *numbers))
    return digest.hexdigest()
