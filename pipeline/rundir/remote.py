"""A run whose `storage` is an object store: the folders on disks are copies of what is there.

    STORAGE/NAME-1/                     as in a backup (`backup.py`), and
                   lease.json           which attempt may write
                   curve.json           the pieces of the curve, also after the last checkpoint
                   spec.yaml, imports   and what else the workers get from the command
                   output, system       and what else they write
                   stop                 asks them to save their state and end

The command has a copy (`remote_command.py`), and each node of the workers another one
(`remote_worker.py`), below the cache's folder.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self, TypeVar

from pipeline.errors import RunError
from pipeline.files.store import FAULTS, Seen, Store, reason
from pipeline.redact import redact
from pipeline.rundir.backup import Backup
from pipeline.rundir.layout import RunDir
from pipeline.rundir.records import Curve, Segment

T = TypeVar("T")
CURVE = "curve.json"
PATIENCE_SECONDS = 60.0
"""How long a store may fail before that ends the run."""
LOOK_SECONDS = 2.0
"""Between looks for what is new."""


def copies(cache: Path, storage: str, whose: str) -> Path:
    """The folder of this machine's copies: the command's ("runs"), the workers' ("workers"), or
    those that were only looked at ("read")."""
    return cache / f".{whose}" / hashlib.sha256(redact(storage).encode()).hexdigest()[:12]


class Remote:
    """A run in an object store, and a copy of it. Methods raise FAULTS, unless they say otherwise.

    What both sides need: the command has a `CommandSide`, a worker a `WorkerSide`.
    """

    def __init__(self, storage: str, run: RunDir) -> None:
        """`run` is the copy. Raises UsageError for a storage that is no place."""
        self.store = Store.at(storage, "storage").below(run.name)
        self.backup = Backup(self.store)
        self.run = run

    def insist(self, work: Callable[[], T]) -> T:
        """Do it, again for a while where it raises FAULTS. Raises RunError in the end."""
        until = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return work()
            except FAULTS as error:
                if time.monotonic() > until:
                    raise RunError(
                        f"storage: {self.store.shown} cannot be used: {reason(error)}"
                    ) from None
            time.sleep(1)

    def curve(self, spec: str, data: str) -> tuple[Segment, ...]:
        """The pieces of the journal, as far as it has come; none of another job than theirs.

        `spec` is a digest, `data` a fingerprint.
        """
        if not self.store.has(CURVE):
            return ()
        try:
            curve = Curve.from_bytes(self.store.read(CURVE))
        except ValueError as error:
            raise ValueError(f"{CURVE}: {error}") from None
        return curve.pieces if (curve.spec, curve.data) == (spec, data) else ()

    def get_inputs(self) -> None:
        """Copy what the command gives to the workers."""
        for name in self.store.files():
            if self.run.is_input(name):
                self.store.get(name, self.run.path / name)

    def get_outputs(self, seen: dict[str, Seen]) -> None:
        """Copy what the workers write, but files that are as `seen`, which is brought to date."""
        for name, now in self.store.files().items():
            if self.run.is_output(name) and seen.get(name) != now:
                self.store.get(name, self.run.path / name)
                seen[name] = now


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

    def start(self) -> Self:
        """Begin, in a thread."""
        self._thread.start()
        return self

    def end(self) -> None:
        """Do it for the last time."""
        self._ended.set()
        self._thread.join()
        self._try()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.end()

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
