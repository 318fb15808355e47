"""Write files so that they are replaced as a whole or not at all, and survive a power failure."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO


@contextlib.contextmanager
def replacing(path: Path, check: Callable[[], None] = lambda: None) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces `path` when the block ends without an error.

    The replacement survives a power failure. `check` raises an error where another process has
    taken over; it is called once the temporary file stands beside `path`, from where the other one
    deletes it: no moment is left at which both could write.
    """
    temporary = temporary_path(path)
    try:
        with named_errors(path), temporary.open("wb") as file:
            yield file
            sync(file)
        check()
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Put `path` into an OSError without a file name, as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)
        raise


def temporary_path(path: Path) -> Path:
    """A new name beside `path`, for a file or folder that is to replace it."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")


def delete_temporaries(path: Path) -> None:
    """Delete temporary files and folders for `path`, whose name may be a glob pattern."""
    for temporary in list(path.parent.glob(f".{path.name}.[0-9]*")):
        with contextlib.suppress(FileNotFoundError):
            if temporary.is_dir():  # which another process may be filling: it loses all at once
                shutil.rmtree(temporary.rename(f"{temporary}-left"), ignore_errors=True)
            else:
                temporary.unlink()


def sync(file: Any) -> None:
    """Write the file's content to the disk (fsync)."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Write the names of files in `folder` to the disk (fsync)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """SHA-256 of the file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
