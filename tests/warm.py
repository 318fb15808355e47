"""Uploaders of runs in this process, forked from one that has imported MLflow long ago.

To import it takes seconds of each of some hundred runs. What they do is what they always do; runs
in processes of their own, by `python -m pipeline`, start them as users do.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pipeline.report import drawing
from pipeline.rundir import RunDir
from pipeline.tracking import process, uploader
from tests.processes import FORKED

FORKED.set_forkserver_preload(
    ["pipeline.train.worker", *uploader.to_import, "sklearn.metrics", "tests.warm"]
)


class Forked:
    """A process that was forked, as `subprocess.Popen` has one that was started."""

    pid: int
    stdin: IO[bytes] | None = None
    stdout: IO[bytes] | None = None
    returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code, once it has ended."""
        raise NotImplementedError

    def wait(self) -> int:
        """Its exit code, when it has ended."""
        raise NotImplementedError

    def kill(self) -> None:
        """End it."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


class Uploader(Forked):
    """From the server, which is asked for it."""

    def __init__(self, log: Path | str, *words: str) -> None:
        reader, writer = FORKED.Pipe(duplex=False)
        self._process = FORKED.Process(
            target=_upload,
            args=(dict(os.environ), os.getcwd(), os.getpid(), reader, str(log), words),
        )
        self._process.start()
        reader.close()
        self.pid = self._process.pid
        self.stdin = os.fdopen(os.dup(writer.fileno()), "wb")
        writer.close()
        if words:
            self.stdin.close()

    def poll(self) -> int | None:
        self.returncode = self._process.exitcode
        return self.returncode

    def wait(self) -> int:
        self._process.join()
        self.returncode = int(self._process.exitcode)
        return self.returncode


def _upload(
    environment: dict[str, str], folder: str, parent: int, reader: Any, log: str, words: list[str]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    os.setsid()
    server = os.getppid()  # which ends with the process that asked for this one
    real = os.getppid
    os.getppid = lambda: parent if real() == server else real()
    os.dup2(reader.fileno(), 0)
    sys.stdin = os.fdopen(0, closefd=False)
    with open(log, "wb") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    vars(drawing)["subprocess"] = _Here
    uploader.to_import.clear()
    sys.exit(uploader.main(*words))


class _Here(Forked):
    """A process that draws, forked from an uploader; it stands for the module `subprocess`."""

    PIPE = subprocess.PIPE

    def __init__(self, *_: object, **__: object) -> None:
        (requests, self_in), (self_out, answers) = os.pipe(), os.pipe()
        self.pid = os.fork()
        if not self.pid:
            for mine, number in ((requests, 0), (answers, 1)):
                os.dup2(mine, number)
            for other in (requests, self_in, self_out, answers):
                os.close(other)
            sys.stdin = os.fdopen(0, closefd=False)
            sys.stdout = os.fdopen(1, "w", closefd=False)
            os._exit(drawing.main())
        os.close(requests)
        os.close(answers)
        self.stdin, self.stdout = os.fdopen(self_in, "wb"), os.fdopen(self_out, "rb")

    Popen: Any = None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


_Here.Popen = _Here


@contextmanager
def _warming_up() -> Iterator[Uploader]:
    started = Uploader(os.devnull)
    try:
        yield started
    finally:
        assert started.stdin is not None
        if not started.stdin.closed:
            started.kill()
            started.stdin.close()
            started.wait()


def _start(run: RunDir, *words: str) -> Uploader:
    return Uploader(run.uploader_log, str(run.path), *words)


def fork_uploaders() -> None:
    """From now on, in this process."""
    process.warming_up = _warming_up  # type: ignore[assignment]
    process.start = _start  # type: ignore[assignment]
