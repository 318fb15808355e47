"""What a crash or a damaged disk has left of a journal, made into one that can be appended to."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from pipeline.files.atomic import replacing
from pipeline.rundir.journal import Kind, key_of_line


def repair(
    path: Path,
    is_evaluated: Callable[[int], bool] = lambda _: False,
    check: Callable[[], None] = lambda: None,
) -> tuple[int, str]:
    """Put a copy of what is intact in the journal's place; its steps, and what was damaged.

    It ends before the first line that is damaged, or that follows a gap: each step is there, and
    an evaluation of those for which `is_evaluated`. A line that was torn when its writer was killed
    is dropped; anything else is kept in a file beside the journal. An earlier attempt that wakes up
    has the old file open, which nobody reads any more. `check` is as for a Journal.
    """
    path.touch()
    last: dict[Kind, int] = {"train": 0, "validation": -1}
    rest, problem = b"", ""

    def num_intact() -> int:
        """Steps that are there, with their evaluation."""
        step = last["train"]
        return step - (is_evaluated(step) and last["validation"] < step)

    with path.open("rb") as file, replacing(path, check) as copy:
        for line in file:
            try:
                step, kind = key_of_line(line)
            except ValueError:
                rest = line + file.read()
                break
            most = max(last["train"], num_intact() + (kind == "train"))
            if kind in last and step > most:
                rest = line + file.read()
                break
            copy.write(line)
            if kind in last:
                last[kind] = max(last[kind], step)
        if b"\n" in rest:
            damaged = path.with_name(f"{path.stem}.damaged-{int(time.time())}{path.suffix}")
            damaged.write_bytes(rest)
            problem = (
                f"{path.name} is damaged after step {last['train']}: what follows is recomputed "
                f"(the old is kept as {damaged.name})"
            )
    return num_intact(), problem
