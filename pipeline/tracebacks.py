"""Errors of custom code: where in it they come from, and the whole traceback in a file."""

from __future__ import annotations

import re
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGE = str(Path(__file__).parent)
NOT_OWN = ("site-packages", "dist-packages", PACKAGE, sysconfig.get_paths()["stdlib"])
SENT = re.compile(r"^.*/working_dir_files/_ray_pkg_[^/]+/")
"""The folder where Ray unpacks what a job was sent."""
MAX_FRAMES = 3
copied_from: dict[str, str] = {}
"""Copies of the user's files and packages in this process, and where the user has them."""


def own_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """Frames of the user's files that led to the error or to what caused it, the innermost last."""
    for one in _chain(error):
        frames = traceback.extract_tb(one.__traceback__)
        own = [f for f in frames if not any(part in f.filename for part in NOT_OWN)]
        own = [frame for frame in own if Path(frame.filename).is_file()]
        if own:
            return own
    return []


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes, the first cause first."""
    chain = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) and before not in chain:
        chain.append(before)
    yield from reversed(chain)


def _place(frame: traceback.FrameSummary) -> str:
    """File and line, as the user has them; of what a Ray job was sent, the path in that."""
    path = Path(frame.filename)
    for copy, original in copied_from.items():
        if path.is_relative_to(copy):
            path = Path(original, path.relative_to(copy))
            break
    return f"{SENT.sub('', str(path))}:{frame.lineno}"


def describe(error: BaseException) -> str:
    """Type and text of an error in one line, with the user's line that it comes from."""
    own = own_frames(error)
    at = f" ({_place(own[-1])})" if own else ""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}{at}" if text else f"{type(error).__name__}{at}"


def in_full(error: BaseException) -> str:
    """Type and text, the user's lines below it, and what was noted of it on its way."""
    text = str(error).strip()
    lines = [f"{type(error).__name__}: {text}" if text else type(error).__name__]
    for frame in reversed(own_frames(error)[-MAX_FRAMES:]):
        lines.append(f"  {_place(frame)}, in {frame.name}: {frame.line}")
    return "\n".join([*lines, *(f"  {note}" for note in getattr(error, "__notes__", []))])


@contextmanager
def noting(text: str) -> Iterator[None]:
    """An error that comes from inside carries this note on its way."""
    try:
        yield
    except Exception as error:  # which goes on as it is
        error.add_note(text)
        raise


def write(error: BaseException, path: Path) -> None:
    """Write the whole traceback, causes included, to `path`."""
    path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
