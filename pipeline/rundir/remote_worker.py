"""The workers' side of a run in an object store: they begin with what is there, and add to it."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.errors import RunError
from pipeline.files.store import DAMAGE, Seen
from pipeline.rundir import pieces
from pipeline.rundir.backup import Backup, BackupThread
from pipeline.rundir.checkpoint import Checkpoints
from pipeline.rundir.layout import RunDir
from pipeline.rundir.lease import Lease
from pipeline.rundir.pieces import Pieces
from pipeline.rundir.records import Curve, Holder, Identity, Segment
from pipeline.rundir.remote import CURVE, Remote, Repeated


class WorkerSide(Remote):
    """A run in an object store, and the copy of a node of the workers."""

    def __init__(self, storage: str, run: RunDir, command: RunDir) -> None:
        """`command` is the command's copy, which only the workers on its machine see."""
        super().__init__(storage, run)
        self._command, self._launcher = command, ""
        self._identity: Identity | None = None
        """Of the attempt's job."""
        self._put: list[Segment] = []
        """What `curve.json` holds of this attempt."""
        self._outputs: dict[Path, Seen] = {}
        """Those that are in the store, as they were put there."""

    def receive(self, launcher: str) -> None:
        """Make the copy, of what the command gives and earlier attempts wrote; states are kept.

        Raises RunError where another command than the workers' own gives it.
        """
        run, self._launcher = self.run, launcher
        run.path.mkdir(parents=True, exist_ok=True)
        for path in run.path.iterdir():
            if path.is_dir() and path != run.checkpoints:
                shutil.rmtree(path)
            elif not path.is_dir():
                path.unlink()
        self.get_inputs()
        self.get_outputs({})
        self._outputs = {path: _seen(path) for path in run.outputs()}
        now = _launcher(run)
        if now["id"] != launcher:
            raise RunError(
                f"process {now['pid']} on {now['host']} has resumed this run; this command writes "
                "nothing more"
            )

    def take(self, identity: Identity, is_own_process: bool) -> tuple[Lease, list[str]]:
        """Take the lease, and copy the newest intact checkpoint and the curve, if they belong to
        this job: a command elsewhere may have begun a run of this name at the same moment.

        Also says which checkpoints were skipped, and why.
        """
        run = self.run
        self._identity = identity
        self.store.get(run.lease.name, run.lease)
        lease = Lease.take(run, is_own_process)
        self.store.put(run.lease, run.lease.name)
        self.store.delete(run.done.name)
        if self.store.get(run.failure.name, run.failure):
            self.store.delete(run.failure.name)
        self.backup.mark = f"-{lease.holder.attempt}-{secrets.token_hex(2)}"
        self.backup.pieces = Pieces(self.store, mark=self.backup.mark)
        step, skipped = self.backup.pull_checkpoint(run, 0, identity)
        for saved in run.saved_steps():
            if saved > step:
                shutil.rmtree(run.checkpoint(saved))
        with suppress(*DAMAGE):  # then it ends with the checkpoint
            curve = self.curve(identity.spec, identity.data)
            content = pieces.joined(self.store, curve)
            if not run.journal.exists() or len(content) >= run.journal.stat().st_size:
                run.journal.write_bytes(content)
                self.backup.pieces = Pieces(self.store, curve, self.backup.mark)
        return lease, skipped

    def begin_curve(self) -> None:
        """Go on with the pieces that are there; from none, where a repair has cut the journal."""
        if sum(piece.bytes for piece in self.backup.pieces.all) != self.run.journal.stat().st_size:
            self.backup.pieces = Pieces(self.store, mark=self.backup.mark)

    def push_curve(self) -> None:
        """Put there what was appended to the journal."""
        self.backup.pieces.push(self.run.journal, closes=False)
        now = list(self.backup.pieces.all)
        if self._put != now:
            assert self._identity is not None
            spec, data = self._identity.spec, self._identity.data
            self.store.write(Curve(spec=spec, data=data, pieces=tuple(now)).to_bytes(), CURVE)
            self._put = now

    def put_outputs(self) -> None:
        """Put what the workers of this node have written since the last time."""
        for path in self.run.outputs():
            now = _seen(path)
            if self._outputs.get(path) != now:
                self.store.put(path, self.run.relative(path))
                self._outputs[path] = now

    def is_to_stop(self) -> bool:
        """Whether the command asks for it: in the store, or on its own machine."""
        with suppress(FileNotFoundError):  # else another command was stopped there, some time ago
            if self._command.stop.exists() and _launcher(self._command)["id"] == self._launcher:
                return True
        return self.store.has(self.run.stop.name)

    def successor(self, holder: Holder) -> Holder | None:
        """The attempt that has taken the lease there since, if there is one."""
        try:
            now = Holder.from_bytes(self.store.read(self.run.lease.name))
        except DAMAGE:
            return None
        return now if now != holder else None


def _launcher(run: RunDir) -> dict[str, Any]:
    """Which command the run is told to be of, by a record of whatever version."""
    launcher: dict[str, Any] = json.loads(run.record.read_bytes())["launcher"]
    return launcher


def _seen(path: Path) -> Seen:
    state = path.stat()
    return Seen(state.st_size, state.st_mtime_ns)


@contextmanager
def putting_outputs(remote: WorkerSide) -> Iterator[None]:
    """Put what this node's workers write; after that their copy is not needed."""
    with Repeated(remote.put_outputs):
        yield
    shutil.rmtree(remote.run.path, ignore_errors=True)


class StorageThread(BackupThread):
    """Puts curve and checkpoints into the store as they come, and the result before the run ends.

    What a backup may lack, a storage may not: where it fails at the end, that is a RunError.
    """

    patience = None

    def __init__(self, remote: WorkerSide, checkpoints: Checkpoints, lease: Lease) -> None:
        super().__init__(remote.run, checkpoints, remote.backup, lease.check)
        self._remote, self._lease = remote, lease
        self._pushed = checkpoints.written
        self._curve = Repeated(self._look)

    def open(self) -> None:
        self._curve.start()

    def close(self) -> None:
        self._curve.end()

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
            self._remote.put_outputs()
            self._remote.backup.push_result(self._run)

        self._remote.insist(push)

    def _look(self) -> None:
        """Ask whether to stop, and put there what the curve has got."""
        if self._remote.is_to_stop():
            self._run.stop.touch()
        self._refuse_other(self._remote.backup)
        self._remote.push_curve()

    def _refuse_other(self, backup: Backup) -> None:
        self._check()
        super()._refuse_other(backup)
        if later := self._remote.successor(self._lease.holder):
            self._superseded = RunError(
                f"attempt {later.attempt} at this run, by process {later.pid} on {later.host}, has "
                "taken over; this one writes nothing more"
            )
            raise self._superseded
