"""A run whose `storage` is an object store: the folders on disks are copies of what is there.

    STORAGE/NAME-1/                     as in a backup (`backup.py`), and
                   lease.json           which attempt may write
                   curve.json           the pieces of the curve, also after the last checkpoint
                   spec.yaml, imports   and what else the workers are told
                   output, system       and what else they note
                   stop                 asks them to save their state and end

The command has a copy, and each node of the workers another one, below the cache's folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self, TypeVar

from pipeline.errors import RunError
from pipeline.files.atomic import replacing
from pipeline.files.store import DAMAGE, FAULTS, Seen, Store, is_uri, reason
from pipeline.redact import redact
from pipeline.rundir import pieces
from pipeline.rundir.backup import Backup
from pipeline.rundir.checkpoint import MANIFEST
from pipeline.rundir.layout import RunDir, facts_of
from pipeline.rundir.lease import Lease
from pipeline.rundir.pieces import Pieces
from pipeline.rundir.records import Curve, Done, Holder, Identity, Segment

T = TypeVar("T")
CURVE = "curve.json"
PATIENCE_SECONDS = 60.0
"""How long a store may fail before that ends the run."""
NOTED = ("nonfinite.json", "held_out.npz", "importance.json", "traceback-", "output/", "system/")
"""What names of files begin with that the workers note."""


def copies(cache: Path, storage: str, whose: str) -> Path:
    """The folder of this machine's copies: the command's ("runs") or the workers' ("workers")."""
    return cache / f".{whose}" / hashlib.sha256(redact(storage).encode()).hexdigest()[:12]


class Remote:
    """One run in an object store. Methods raise FAULTS, unless they say otherwise."""

    def __init__(self, storage: str, run: str) -> None:
        """Raises UsageError for a place that is none."""
        self.store = Store.at(storage, "storage").below(run)
        self.backup = Backup(self.store)
        self._put: list[Segment] = []
        """What `curve.json` holds of this attempt."""
        self.command: RunDir | None = None
        """The command's copy, which the workers see only where they are on its machine."""
        self._identity: Identity | None = None
        """Of the attempt's job."""

    @classmethod
    def of(cls, storage: str, run: RunDir) -> Self | None:
        """The run there; None where the storage is a folder."""
        return cls(storage, run.name) if is_uri(storage) else None

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

    # the command's side

    def send(self, run: RunDir) -> None:
        """Put there what the workers are told: from then on the run is this command's.

        It is not finished, or its end is done again: what is left of that goes, on both sides.
        """
        for path in (run.done, run.failure):
            path.unlink(missing_ok=True)
        self.store.put(run.record, run.record.name)
        left = (run.stop.name, run.failure.name, run.done.name)
        for name in self.store.names():
            if name in left or name.startswith("traceback-"):
                self.store.delete(name)
        for path in run.told:
            self.store.put(path, run.relative(path))

    def fetch(self, run: RunDir) -> None:
        """Bring the command's copy to what is there, but for checkpoints.

        A damaged curve or result is left out: the workers begin before it.
        """
        if not self.store.has(run.record.name):
            raise FileNotFoundError(f"there is no {run.record.name}")
        self._get_told(run)
        self.get_noted(run, {})
        self.get_manifests(run)
        try:
            self._get_result(run)
        except DAMAGE:
            run.done.unlink(missing_ok=True)
            with contextlib.suppress(*DAMAGE):
                content = pieces.joined(self.store, self.curve())
                if not run.journal.exists() or run.journal.read_bytes() != content:
                    with replacing(run.journal) as file:
                        file.write(content)

    def _get_result(self, run: RunDir) -> None:
        done = Done.from_bytes(self.store.read(run.done.name))
        if not _is(run.journal, done):
            with replacing(run.journal) as file:
                file.write(pieces.joined(self.store, done.journal))
        if not _is(run.weights, done):
            self.store.get(run.weights.name, run.weights)
        done.model_copy(update={"journal": ()}).write(run.done)

    def keep_recorded(self, run: RunDir) -> None:
        """Put there how much MLflow has, for a command on another machine."""
        with contextlib.suppress(*FAULTS):  # which it finds out without, in more time
            self.store.put(run.recorded, run.recorded.name)

    def curve(self, of: Identity | None = None) -> tuple[Segment, ...]:
        """The pieces of the journal, as far as it has come; none of another job than that `of`."""
        if not self.store.has(CURVE):
            return ()
        curve = Curve.from_bytes(self.store.read(CURVE))
        if of and (curve.spec, curve.data) != (of.spec, of.data):
            return ()
        return curve.pieces

    def get_noted(self, run: RunDir, seen: dict[str, Seen]) -> None:
        """Copy what the workers note, where it is not as it was `seen`; that is brought to date."""
        for name, now in self.store.files().items():
            if name.startswith(NOTED) and seen.get(name) != now:
                self.store.get(name, run.path / name)
                seen[name] = now

    def get_manifests(self, run: RunDir) -> None:
        """Copy which checkpoints there are, without their states."""
        there = self.backup.checkpoints()
        for path in run.checkpoints.glob("step-*"):
            if path.name not in there:
                shutil.rmtree(path, ignore_errors=True)
        for name in there:
            path = run.checkpoints / name / MANIFEST
            if not path.exists():
                self.store.get(f"{name}/{MANIFEST}", path)

    # the workers' side

    def receive(self, run: RunDir, launcher: str) -> None:
        """Make a node's copy of what the workers are told; of what was there, states are kept.

        Raises RunError where that is told by another command than theirs.
        """
        run.path.mkdir(parents=True, exist_ok=True)
        for path in run.path.iterdir():
            if path.is_dir() and path != run.checkpoints:
                shutil.rmtree(path)
            elif not path.is_dir():
                path.unlink()
        self._get_told(run)
        now = json.loads(run.record.read_bytes())["launcher"]  # of whatever version
        if now["id"] != launcher:
            raise RunError(
                f"process {now['pid']} on {now['host']} has resumed this run; this command writes "
                "nothing more"
            )

    def take(
        self, run: RunDir, identity: Identity, is_own_process: bool
    ) -> tuple[Lease, list[str]]:
        """Take the lease, and copy the newest intact checkpoint and the curve, if they belong to
        this job: a command elsewhere may have begun a run of this name at the same moment.

        Also says which checkpoints were skipped, and why.
        """
        self._identity = identity
        self.store.get(run.lease.name, run.lease)
        lease = Lease.take(run, is_own_process)
        self.store.put(run.lease, run.lease.name)
        self.store.delete(run.done.name)
        if self.store.get(run.failure.name, run.failure):
            self.store.delete(run.failure.name)
        self.backup.mark = f"-{lease.holder.attempt}-{secrets.token_hex(2)}"
        step, skipped = self.backup.pull_checkpoint(run, 0, identity)
        for saved in run.saved_steps():
            if saved > step:
                shutil.rmtree(run.checkpoint(saved))
        with contextlib.suppress(*DAMAGE):  # then it ends with the checkpoint
            curve = self.curve(identity)
            content = pieces.joined(self.store, curve)
            if not run.journal.exists() or len(content) >= run.journal.stat().st_size:
                run.journal.write_bytes(content)
                self.backup.pieces = Pieces(self.store, curve, self.backup.mark)
        return lease, skipped

    def begin_curve(self, journal: Path) -> None:
        """Go on with the pieces that are there; from none, where a repair has cut the journal."""
        if sum(piece.bytes for piece in self.backup.pieces.all) != journal.stat().st_size:
            self.backup.pieces = Pieces(self.store, mark=self.backup.mark)

    def push_curve(self, journal: Path) -> None:
        """Put there what was appended to the journal."""
        self.backup.pieces.push(journal, closes=False)
        if self._put != self.backup.pieces.all:
            self._put_curve()

    def put_noted(self, run: RunDir, seen: dict[Path, Seen]) -> None:
        """Put what the workers of this node note, where it is not as it was `seen`."""
        for path in run.noted:
            state = path.stat()
            now = Seen(state.st_size, state.st_mtime_ns)
            if seen.get(path) != now:
                self.store.put(path, run.relative(path))
                seen[path] = now

    def successor(self, holder: Holder) -> Holder | None:
        """The attempt that has taken the lease there since, if there is one."""
        try:
            now = Holder.from_bytes(self.store.read("lease.json"))
        except DAMAGE:
            return None
        return now if now != holder else None

    def _get_told(self, run: RunDir) -> None:
        for name in self.store.files():
            folder, _, rest = name.partition("/")
            path = run.path / name
            if path in (run.record, run.recorded, run.spec, run.initial, run.parent) or (
                folder == run.imports.name and rest
            ):
                self.store.get(name, path)

    def _put_curve(self) -> None:
        now = list(self.backup.pieces.all)
        assert self._identity is not None
        curve = Curve(spec=self._identity.spec, data=self._identity.data, pieces=tuple(now))
        self.store.write(curve.to_bytes(), CURVE)
        self._put = now


def _is(path: Path, done: Done) -> bool:
    """Whether a file of the result is here already."""
    return path.exists() and facts_of(path) == done.files.get(path.name)
