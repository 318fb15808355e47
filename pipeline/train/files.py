"""The files in a run's folder that launcher, workers and delivery share: names, and writing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

CURVE = "curve.jsonl"
"""The journal, written by the first worker."""
DONE = "done.json"
"""Written by the first worker when the last step is done and the weights are saved."""
ENDED = "ended.json"
"""Written by the launcher: how training ended."""
FAILURE = "failure.txt"
"""Written by Ray's controller: why workers are started again."""
RECORD = "record.json"
"""Written by the launcher: what MLflow is told besides the curve."""
RECORDED = "recorded.json"
"""Written by the delivery: how much of it MLflow has."""
STOP = "stop"
"""Written by the launcher; asks the workers to save their state and end."""


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path`: the whole file or none of it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(value), encoding="utf-8")
    aside.replace(path)
