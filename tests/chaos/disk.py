"""A disk that remembers each operation on it, or lets one of them go wrong.

Stands between this process and the files below one folder: writes, flushes to the disk, renames,
new and deleted names. What it remembers can be laid out again as a power cut at any moment would
have left it.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["make", "write", "flush", "cut", "folder", "rename", "remove", "mkdir", "rmdir"]


@dataclass(frozen=True)
class Operation:
    """One change. `path` is below the folder; `other` is where it is renamed to."""

    kind: Kind
    path: str
    data: bytes = b""
    at: int = 0
    other: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.path}"


class _File(io.RawIOBase):
    """A file whose writes are told before they happen."""

    def __init__(self, disk: Disk, path: str, descriptor: int) -> None:
        self._disk, self._path, self._fd = disk, path, descriptor
        disk.open[descriptor] = path

    def fileno(self) -> int:
        return self._fd

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = os.read(self._fd, len(buffer))
        buffer[: len(found)] = found
        return len(found)

    def write(self, data: Any) -> int:
        content = bytes(data)
        at = os.lseek(self._fd, 0, os.SEEK_CUR)
        if os.get_blocking(self._fd) and self._disk.appends.get(self._fd):
            at = os.fstat(self._fd).st_size
        self._disk.tell(Operation("write", self._path, content, at))
        return os.write(self._fd, content)

    def seek(self, place: int, whence: int = 0) -> int:
        return os.lseek(self._fd, place, whence)

    def truncate(self, size: int | None = None) -> int:
        place = os.lseek(self._fd, 0, os.SEEK_CUR) if size is None else size
        self._disk.tell(Operation("cut", self._path, at=place))
        os.ftruncate(self._fd, place)
        return place

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._disk.open.pop(self._fd, None)
            os.close(self._fd)


class Disk:
    """Sees all changes below `folder` while it is `watching`.

    `before` is called with each one's number before it happens, and may end or fail it.
    """

    def __init__(
        self, folder: Path, before: Callable[[int, Operation], None] | None = None
    ) -> None:
        self.folder, self._before = str(folder), before
        self.seen: list[Operation] = []
        self.open: dict[int, str] = {}
        self.appends: dict[int, bool] = {}
        self._number = 0

    def tell(self, operation: Operation) -> None:
        """Note the operation, and do to it what was planned."""
        number, self._number = self._number, self._number + 1
        if self._before is not None:
            self._before(number, operation)
        self.seen.append(operation)

    def _below(self, path: Any) -> str | None:
        text = os.path.abspath(os.fspath(path)) if isinstance(path, str | os.PathLike) else ""
        return text[len(self.folder) + 1 :] if text.startswith(self.folder + "/") else None

    @contextmanager
    def watching(self) -> Iterator[Disk]:
        """Put it between this process and its files."""
        real: dict[tuple[Any, str], Any] = {
            (builtins, "open"): builtins.open, (io, "open"): io.open, (os, "fsync"): os.fsync,
            (os, "rename"): os.rename, (os, "replace"): os.replace, (os, "mkdir"): os.mkdir,
            (os, "unlink"): os.unlink, (os, "remove"): os.remove, (shutil, "rmtree"): shutil.rmtree,
            (os, "open"): os.open,
        }  # fmt: skip
        kept_open, fsync, os_open = builtins.open, os.fsync, os.open

        def opened(file: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
            place = self._below(file)
            if place is None or not set(mode) & set("wax+"):
                return kept_open(file, mode, *more, **named)
            flags = os.O_RDWR | os.O_CREAT * ("r" not in mode) | os.O_APPEND * ("a" in mode)
            if not os.path.exists(file) and "r" not in mode:
                self.tell(Operation("make", place))
            elif "w" in mode:
                self.tell(Operation("cut", place))
                flags |= os.O_TRUNC
            descriptor = os_open(file, flags, 0o644)
            self.appends[descriptor] = "a" in mode
            raw = _File(self, place, descriptor)
            binary: Any = io.BufferedRandom(raw)
            return binary if "b" in mode else io.TextIOWrapper(binary, encoding="utf-8")

        def made(path: Any, flags: int, *more: Any, **named: Any) -> int:
            place = self._below(path)
            if place is not None and flags & os.O_CREAT and not os.path.exists(path):
                self.tell(Operation("make", place))
            return os_open(path, flags, *more, **named)

        def flushed(descriptor: int) -> None:
            if descriptor in self.open:
                self.tell(Operation("flush", self.open[descriptor]))
            else:
                place = self._below(os.readlink(f"/proc/self/fd/{descriptor}") + "/.")
                if place is not None or os.readlink(f"/proc/self/fd/{descriptor}") == self.folder:
                    name = os.readlink(f"/proc/self/fd/{descriptor}")[len(self.folder) + 1 :]
                    self.tell(Operation("folder", name))
            fsync(descriptor)

        def told(kind: Kind, function: Any) -> Any:
            def wrapped(path: Any, *more: Any, **named: Any) -> Any:
                place = self._below(path)
                if place is not None:
                    other = self._below(more[0]) if kind == "rename" else ""
                    self.tell(Operation(kind, place, other=other or ""))
                return function(path, *more, **named)

            return wrapped

        def removed(path: Any, ignore_errors: bool = False, *_: Any, **__: Any) -> None:
            if self._below(path) is None:
                real[shutil, "rmtree"](path, ignore_errors=ignore_errors)
                return
            if not os.path.isdir(path):
                if not ignore_errors:
                    raise FileNotFoundError(path)
                return
            for name in sorted(os.listdir(path)):
                inside = os.path.join(path, name)
                removed(inside) if os.path.isdir(inside) else os.unlink(inside)
            self.tell(Operation("rmdir", self._below(path) or ""))
            os.rmdir(path)

        changed = {
            (builtins, "open"): opened, (io, "open"): opened, (os, "fsync"): flushed,
            (os, "rename"): told("rename", os.rename), (os, "replace"): told("rename", os.replace),
            (os, "mkdir"): told("mkdir", os.mkdir), (os, "unlink"): told("remove", os.unlink),
            (os, "remove"): told("remove", os.remove), (shutil, "rmtree"): removed,
            (os, "open"): made,
        }  # fmt: skip
        for (module, name), function in changed.items():
            setattr(module, name, function)
        try:
            yield self
        finally:
            for (module, name), function in real.items():
                setattr(module, name, function)


Loss = Literal["clean", "dropped", "torn"]


def laid_out(operations: Sequence[Operation], folder: Path, loss: Loss) -> None:
    """What a power cut after the operations leaves in `folder`.

    Clean: all of it. Dropped: contents only as far as they were flushed to the disk, and new or
    renamed names only where their folder was. Torn: the same, with half of each file's last write.
    """
    files: dict[str, bytearray] = {}
    safe: dict[str, bytes] = {}
    torn: dict[str, bytes] = {}
    names: dict[str, str] = {}  # as they are, to the content's first name
    kept: dict[str, str] = {}  # as the disk has them
    folders, kept_folders = {""}, {""}
    for number, op in enumerate(operations):
        content = names.get(op.path, "")
        if op.kind == "make":
            names[op.path] = content = f"{op.path}#{number}"
            files[content], safe[content], torn[content] = bytearray(), b"", b""
        elif op.kind == "write":
            torn[content] = bytes(files[content])
            data = files[content]
            data.extend(bytes(max(0, op.at - len(data))))
            data[op.at : op.at + len(op.data)] = op.data
            torn[content] = bytes(data[: op.at + len(op.data) // 2])
        elif op.kind == "cut":
            del files[content][op.at :]
            torn[content] = bytes(files[content])
        elif op.kind == "flush":
            safe[content] = torn[content] = bytes(files[content])
        elif op.kind == "rename":
            for name in [n for n in names if n == op.path or n.startswith(op.path + "/")]:
                names[op.other + name[len(op.path) :]] = names.pop(name)
            for name in [n for n in folders if n == op.path or n.startswith(op.path + "/")]:
                folders.discard(name)
                folders.add(op.other + name[len(op.path) :])
        elif op.kind == "remove":
            names.pop(op.path, None)
        elif op.kind == "mkdir":
            folders.add(op.path)
        elif op.kind == "rmdir":
            folders.discard(op.path)
        elif op.kind == "folder":
            inside = [n for n in kept if os.path.dirname(n) == op.path]
            for name in inside:
                kept.pop(name)
            kept.update({n: c for n, c in names.items() if os.path.dirname(n) == op.path})
            below = {f for f in kept_folders if f and os.path.dirname(f) == op.path}
            now = {f for f in folders if f and os.path.dirname(f) == op.path}
            for gone in below - now:
                kept_folders.discard(gone)
                for name in [n for n in kept if n.startswith(gone + "/")]:
                    kept.pop(name)
            for made in now - below:
                kept_folders.add(made)
                kept.update({n: c for n, c in names.items() if os.path.dirname(n) == made})
    kept = {name: kept[name] for name in kept if os.path.dirname(name) in kept_folders}
    found, contents = (names, files) if loss == "clean" else (kept, safe)
    if loss == "torn":
        found, contents = names, torn
        kept_folders = folders
    for name in sorted(folders if loss == "clean" else kept_folders):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, content in found.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(contents[content]))


def failing(at: int, action: str) -> Callable[[int, Operation], None]:
    """What happens at operation number `at`: kill, raise, full, broken or stop."""

    def before(number: int, operation: Operation) -> None:
        if number != at:
            return
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif action == "raise":
            raise RuntimeError(f"planned, at {operation.kind} of {operation.path}")
        else:
            number_of = errno.ENOSPC if action == "full" else errno.EIO
            raise OSError(number_of, os.strerror(number_of))

    return before
