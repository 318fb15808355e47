"""Texts that a person has read and found right: what is printed now has to be the same.

`APPROVE=1 pytest ...` writes them anew; read the difference before you commit it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

PASSING = re.compile(
    r"(\[\d{4}-|epoch \d|step \d|(starting|waiting) .* \d+ s$| +recording to MLflow)"
)
CHANGING = (
    (r"\b(\d{1,3}\.){3}\d{1,3}(:\d+)?\b", "ADDRESS"),
    (r"\b[0-9a-f]{32,}\b", "ID"),
    (r"-[0-9a-f]{8}(?=-\d)", "-ID"),
    (r"-[0-9a-f]{6}\b", "-ID"),
    (r"\d+:\d\d(:\d\d)?\b", "TIME"),
    (r"\bin -?\d+ s\b", "in N s"),
    (r"\.\.\. \d+ s$", "... N s"),
    (r"\bstep \d+(,\d{3})*", "step N"),
    (r"\bworker \d+ of", "worker N of"),
    (r"\b\d+(,\d{3})* steps? (is|are|was|were) recomputed", "N steps recomputed"),
    (r"\bRay \d[\d.]*", "Ray VERSION"),
    (r"_ray_pkg_\w+", "PACKAGE"),
    (r"session_[\d_-]+", "SESSION"),
    (r"[\d.]+ (KiB|GiB on)", r"N \1"),
    (r"^(workers .* room for) \d+", r"\1 N"),
)


def stable(text: str) -> str:
    """The text with what differs from run to run replaced, and without progress and logs."""
    lines = [line for line in text.splitlines() if not PASSING.match(line)]
    for pattern, word in CHANGING:
        lines = [re.sub(pattern, word, line) for line in lines]
    lines = [line for i, line in enumerate(lines) if i == 0 or line != lines[i - 1]]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def approve(path: Path, text: str) -> None:
    """Compare what was printed with the file, or write it where that is asked for."""
    found = stable(text)
    if os.environ.get("APPROVE"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(found)
    assert path.exists(), f"{path.name}: nobody has approved\n{found}"
    assert found == path.read_text(), path.name
