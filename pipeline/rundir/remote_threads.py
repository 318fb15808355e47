"""Threads that bring a run in an object store, and its copies on disks, up to date as it trains."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from pipeline.errors import RunError
from pipeline.files.store import FAULTS, Seen, reason
from pipeline.rundir.backup import Backup, BackupThread
from pipeline.rundir.checkpoint import Checkpoints
from pipeline.rundir.layout import RunDir
from pipeline.rundir.lease import Lease
from pipeline.rundir.pieces import Follower
from pipeline.rundir.remote import Remote

LOOK_SECONDS = 2.0
"""Between looks for what is new."""


class Repeated:
    """Does some work every two seconds until it is left, and then once more."""

    def __init__(
        self, work: Callable[[], None], say: Callable[[str], None] = lambda _: None
    ) -> None:
        """`say` is told why it fails, once, and that it does no more; it is tried again."""
        self._work, self._say = work, say
        self._fault = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._repeat, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._try()

    def _repeat(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            self._try()

    def _try(self) -> None:
        before = self._fault
        try:
            self._work()
            self._fault = ""
        except Exception as error:  # whatever it is, the next time may be better
            self._fault = reason(error) or repr(error)
        if bool(self._fault) != bool(before):
            self._say(f"{self._fault}; it is tried again" if self._fault else "it is in use again")


class Following:
    """The command's copy follows what the workers do, and the workers hear of the command."""

    def __init__(self, remote: Remote, run: RunDir) -> None:
        self._remote, self._run = remote, run
        self._follower = Follower(remote.store, run.journal)
        self._seen: dict[str, Seen] = {}
        self._told: dict[Path, int] = {}

    def look(self) -> None:
        """Copy what is new, either way. Raises FAULTS."""
        for path in (self._run.stop, self._run.failure):
            time_of = path.stat().st_mtime_ns if path.exists() else None
            if time_of is not None and self._told.get(path) != time_of:
                self._remote.store.put(path, path.name)
                self._told[path] = time_of
        self._follower.update(self._remote.curve())
        self._remote.get_manifests(self._run)
        self._remote.get_noted(self._run, self._seen)


@contextmanager
def noting(remote: Remote, run: RunDir) -> Iterator[None]:
    """Bring to the store what this node's workers note; after that their copy is not needed."""
    seen: dict[Path, Seen] = {}
    with Repeated(lambda: remote.put_noted(run, seen)):
        yield
    shutil.rmtree(run.path, ignore_errors=True)


@contextmanager
def following(storage: str, run: RunDir, say: Callable[[str], None]) -> Iterator[None]:
    """Let the command's copy of a run in an object store follow it, to its end.

    `say` is told where the store fails meanwhile. Raises RunError where it cannot be read at the
    end. A run in a folder needs none of this.
    """
    remote = Remote.of(storage, run)
    if remote is None:
        yield
        return
    try:
        shown = remote.store.shown
        with Repeated(Following(remote, run).look, lambda text: say(f"storage: {shown}: {text}")):
            yield
    except BaseException:
        with suppress(*FAULTS):  # the error itself is to be heard of
            remote.fetch(run)
        raise
    remote.insist(lambda: remote.fetch(run))


class StorageThread(BackupThread):
    """Puts curve and checkpoints into the store as they come, and the result before the run ends.

    What a backup may lack, a storage may not: where it fails at the end, that is a RunError.
    """

    patience = None

    def __init__(self, run: RunDir, checkpoints: Checkpoints, remote: Remote, lease: Lease) -> None:
        super().__init__(run, checkpoints, remote.backup, lease.check)
        self._remote, self._lease = remote, lease
        self._pushed = checkpoints.written
        self._curve = Repeated(self._look)

    def open(self) -> None:
        self._curve.__enter__()

    def close(self) -> None:
        self._curve.__exit__()

    def update(self, wait: bool = False) -> str:
        """As of a backup; with `wait`, RunError where the checkpoint could not be put there."""
        problem = super().update(wait)
        if wait and self._fault:
            raise RunError(self._fault)
        return problem

    def push_result(self) -> None:
        """Put the result there. Raises RunError when that fails for a while."""

        def push() -> None:
            self._refuse_other(self._remote.backup)
            self._remote.backup.push_result(self._run)

        self._remote.insist(push)

    def _look(self) -> None:
        """Ask whether to stop, and put there what the curve has got."""
        here = self._remote.command
        if (here and here.stop.exists()) or self._remote.store.has(self._run.stop.name):
            self._run.stop.touch()
        self._refuse_other(self._remote.backup)
        self._remote.push_curve(self._run.journal)

    def _refuse_other(self, backup: Backup) -> None:
        self._check()
        super()._refuse_other(backup)
        if later := self._remote.successor(self._lease.holder):
            self._superseded = RunError(
                f"attempt {later.attempt} at this run, by process {later.pid} on {later.host}, has "
                "taken over; this one writes nothing more"
            )
            raise self._superseded
