"""A folder of files in an object store, or on a disk, by its URI.

There is no renaming in an object store: a file is there as a whole or not at all.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.errors import UsageError
from pipeline.files.atomic import replacing
from pipeline.redact import redact

PART_BYTES = 2**22
FAULTS = (OSError, pa.ArrowException, ValueError, LookupError)
"""What a store may raise, or what is read from one."""
DAMAGE = (FileNotFoundError, ValueError, LookupError)
"""Of these, what says that a file is missing or not what it was; the others may pass."""


class Seen(NamedTuple):
    """What tells that a file has changed."""

    bytes: int
    time: int
    """Of its last change, in nanoseconds since 1970."""


class Store:
    """A folder; names of files are paths below it. Without a word, methods raise OSError."""

    def __init__(self, filesystem: Any, root: str, shown: str) -> None:
        self.filesystem, self.root = filesystem, root
        self.shown = shown
        """Its address, without a password."""

    @classmethod
    def at(cls, uri: str, key: str) -> Store:
        """The folder at a URI or path. Raises UsageError that begins with the spec's `key`."""
        try:
            if is_uri(uri):
                filesystem, root = pafs.FileSystem.from_uri(uri)
                return cls(filesystem, root, redact(uri))
            path = str(Path(uri).expanduser().resolve())
            return cls(pafs.LocalFileSystem(), path, redact(uri))
        except (OSError, pa.ArrowException, ValueError) as error:
            raise UsageError(f"{key}: {redact(uri)} cannot be used: {reason(error)}") from None

    def below(self, name: str) -> Store:
        """A folder in this one."""
        address, mark, options = self.shown.partition("?")
        return Store(self.filesystem, f"{self.root}/{name}", f"{address}/{name}{mark}{options}")

    def names(self) -> list[str]:
        """Names of files and folders in it, in order; none if there is no such folder."""
        infos = self.filesystem.get_file_info(pafs.FileSelector(self.root, allow_not_found=True))
        return sorted(info.base_name for info in infos)

    def files(self) -> dict[str, Seen]:
        """All files below it, by name."""
        selector = pafs.FileSelector(self.root, allow_not_found=True, recursive=True)
        return {
            info.path.removeprefix(f"{self.root}/"): Seen(info.size, info.mtime_ns or 0)
            for info in self.filesystem.get_file_info(selector)
            if info.is_file
        }

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return bool(self.filesystem.get_file_info(self._path(name)).is_file)

    def read(self, name: str) -> bytes:
        """A file's content."""
        with self.filesystem.open_input_stream(self._path(name)) as file:
            content: bytes = file.read()
        return content

    def get(self, name: str, path: Path) -> bool:
        """Copy a file here, where there is one; it replaces `path` as a whole."""
        if not self.has(name):
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.filesystem.open_input_stream(self._path(name)) as source, replacing(path) as file:
            shutil.copyfileobj(source, file, PART_BYTES)
        return True

    def write(self, content: bytes, name: str) -> None:
        """Put a file there."""
        with self._open(name) as file:
            file.write(content)

    def put(self, path: Path, name: str) -> None:
        """Copy a file there."""
        with path.open("rb") as source, self._open(name) as file:
            shutil.copyfileobj(source, file, PART_BYTES)

    def delete(self, name: str) -> None:
        """Delete a file, if there is one."""
        with contextlib.suppress(FileNotFoundError):
            if self.has(name):
                self.filesystem.delete_file(self._path(name))

    def delete_folder(self, name: str) -> None:
        """Delete a folder and what is in it."""
        self.filesystem.delete_dir(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def _open(self, name: str) -> Any:
        if isinstance(self.filesystem, pafs.LocalFileSystem):
            path = Path(self.root, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            return replacing(path)
        return self.filesystem.open_output_stream(self._path(name))


def is_uri(place: str) -> bool:
    """Whether it is a URI, and no path."""
    return "://" in place


def reason(error: Exception) -> str:
    """The first line of a file system's long texts, without secrets."""
    return redact(re.sub(r"^\[Errno \d+\] ", "", str(error).partition("\n")[0]))
