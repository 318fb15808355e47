"""The files in a run's folder that launcher, workers and delivery share: names, and writing."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.errors import UsageError

CHECKPOINTS = "checkpoints/step-*"
"""Folders of the first worker's checkpoints."""
CURVE = "curve.jsonl"
"""The journal, written by the first worker."""
DONE = "done.json"
"""Written by the first worker when the last step is done and the weights are saved."""
ENDED = "ended.json"
"""Written by the launcher: how training ended."""
FAILURE = "failure.txt"
"""Written by Ray's controller: why workers are started again."""
LEASE = "lease.json"
"""Written by the first worker of each attempt: which process may write."""
LOCK = ".lock"
"""Held by the command that trains the run."""
NONFINITE = "nonfinite.json"
"""Written by the first worker: the last step that was not finite, and all rows it comes from."""
RECORD = "record.json"
"""Written by the launcher: what MLflow is told besides the curve."""
RECORDED = "recorded.json"
"""Written by the delivery: how much of it MLflow has."""
STOP = "stop"
"""Written by the launcher; asks the workers to save their state and end."""
TRACEBACKS = "traceback-*.txt"
"""Written by a worker that ends with an error of own code; the star is its number."""
WEIGHTS = "weights.pt"
"""Written by the first worker after the last step."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other commands out of the run while this one trains or records it.

    The kernel lets go for us, however this process ends. Raises UsageError when another has it.
    """
    with (folder / LOCK).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise UsageError(
                f"{folder.name} is being trained or recorded right now, by "
                f"{lock.read() or 'another command'}; wait for it, or start another run with "
                "--fresh"
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield


@contextlib.contextmanager
def replacing(path: Path, may_write: Callable[[], None] = lambda: None) -> Iterator[BinaryIO]:
    """A file to write to that takes the place of `path` when all went well: all of it or nothing.

    It outlives a power cut then. `may_write` raises an error where another process has taken over;
    it is asked once the file stands beside the place, from where the other one deletes it: no
    moment is left at which both could write.
    """
    aside = beside(path)
    try:
        with naming(path), aside.open("wb") as file:
            yield file
            to_disk(file)
        may_write()
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    folder_to_disk(path.parent)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of the disk names `path`: a full one does not say where it is."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)
        raise


def beside(path: Path) -> Path:
    """A new name for what is to take the place of `path`, a file or a folder."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")


def delete_asides(path: Path) -> None:
    """Delete what others were about to put in the place of `path`, whose name may be a pattern."""
    names = [f".{place.name}.[0-9]*" for place in (path, _copy(path))]
    for aside in [found for name in names for found in path.parent.glob(name)]:
        with contextlib.suppress(FileNotFoundError):
            if aside.is_dir():  # which another process may be filling: it loses the whole at once
                shutil.rmtree(aside.rename(f"{aside}-left"), ignore_errors=True)
            else:
                aside.unlink()


def write_json(
    path: Path, value: Mapping[str, Any], may_write: Callable[[], None] = lambda: None
) -> None:
    """Write `value` and its SHA-256 to `path`, and once more beside it; see `replacing`."""
    text = text_of(sealed(value))
    for place in (path, _copy(path)):
        with replacing(place, may_write) as file:
            file.write(text)


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote; if the file is damaged, its copy's or an earlier content.

    Raises FileNotFoundError without the file, and ValueError where both are damaged.
    """
    try:
        return unsealed(path.read_bytes())
    except ValueError:
        try:
            return unsealed(_copy(path).read_bytes())
        except (OSError, ValueError):
            raise ValueError(f"{path} is damaged") from None


def text_of(value: Mapping[str, Any]) -> bytes:
    """As it stands in a file."""
    return json.dumps(value, indent=1).encode()


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """The value with its own SHA-256."""
    return {**value, "sha256": _digest(value)}


def unsealed(content: bytes) -> dict[str, Any]:
    """A value that was `sealed`. Raises ValueError when it is not what was written."""
    found = json.loads(content)
    if not isinstance(found, dict) or found.pop("sha256", None) != _digest(found):
        raise ValueError("it is damaged")
    return found


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _copy(path: Path) -> Path:
    return path.with_name(f".{path.name}.copy")


def sha256(path: Path) -> str:
    """Of the file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_disk(file: Any) -> None:
    """What was written to `file` outlives a power cut."""
    file.flush()
    os.fsync(file.fileno())


def folder_to_disk(folder: Path) -> None:
    """Names of new files in `folder` outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_done(folder: Path) -> bool:
    """Whether the run's last step is done, and its curve and weights are as they were written."""
    return (folder / DONE).exists() and not damage(folder)


def damage(folder: Path) -> str:
    """What is not as a finished run has left it, if it ever was finished."""
    if not (folder / DONE).exists():
        return ""
    try:
        written = read_json(folder / DONE)["files"]
        for name in (CURVE, WEIGHTS):
            if not (folder / name).exists():
                return f"{name} is missing"
            if sha256(folder / name) != written[name]:
                return f"{name} is damaged"
    except (OSError, ValueError, KeyError):
        return f"{DONE} is damaged"
    return ""
