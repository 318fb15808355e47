"""The command's side of a run in an object store: what workers need goes there, news comes back."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from pipeline.errors import UsageError
from pipeline.files.atomic import replacing
from pipeline.files.store import DAMAGE, FAULTS, Seen, is_uri, reason
from pipeline.rundir import pieces
from pipeline.rundir.checkpoint import MANIFEST, STATE
from pipeline.rundir.layout import RunDir
from pipeline.rundir.pieces import Follower
from pipeline.rundir.records import Record, Recorded, Segment
from pipeline.rundir.remote import Remote, Repeated, copies


class CommandSide(Remote):
    """A run in an object store, and the command's copy of it: without the checkpoints' states."""

    @classmethod
    def of(cls, storage: str, run: RunDir) -> Self | None:
        """The run there; None where the storage is a folder."""
        return cls(storage, run) if is_uri(storage) else None

    def send(self) -> None:
        """Put there what the workers get: from then on the run is this command's.

        It is not finished, or its end is done again: what is left of that goes, on both sides.
        """
        run = self.run
        for path in (run.done, run.failure):
            path.unlink(missing_ok=True)
        for step in run.saved_steps():  # of the shorter run that this one goes on from
            if (state := run.checkpoint(step) / STATE).exists():
                self.backup.push(run.checkpoint(step), run.journal, keep=1)
                state.unlink()
        self.store.put(run.record, run.record.name)
        left = (run.stop.name, run.failure.name, run.done.name)
        for name in self.store.names():
            if name in left or name.startswith("traceback-"):
                self.store.delete(name)
        for path in run.inputs():
            self.store.put(path, run.relative(path))

    def fetch(self) -> None:
        """Bring the copy to what is there.

        A damaged curve or result is left out: the workers begin before it.
        """
        run = self.run
        if not self.store.has(run.record.name):
            raise FileNotFoundError(f"there is no {run.record.name}")
        self._delete_other()
        self.get_inputs()
        self.get_outputs({})
        self.get_manifests()
        with suppress(*DAMAGE):
            if self.backup.pull_result(run):
                return
        run.done.unlink(missing_ok=True)
        with suppress(*DAMAGE):
            content = pieces.joined(self.store, self.own_curve())
            if not run.journal.exists() or run.journal.read_bytes() != content:
                with replacing(run.journal) as file:
                    file.write(content)

    def own_curve(self) -> tuple[Segment, ...]:
        """The pieces of the journal; none of another job, which has taken the name since."""
        record = self.run.read_record()
        assert record is not None
        return self.curve(record.digest, record.data.fingerprint)

    def keep_recorded(self) -> None:
        """Put there how much MLflow has, for a command on another machine, if none is there now."""
        with suppress(*FAULTS):  # which it finds out without, in more time
            record = self.run.read_record()
            if record and self.backup.launcher() == record.launcher:
                self.store.put(self.run.recorded, self.run.recorded.name)

    def get_recorded(self) -> None:
        """Copy how much MLflow has, unless that was made complete on this machine since."""
        here, name = self.run.read_recorded(), self.run.recorded.name
        with suppress(*DAMAGE):
            there = Recorded.from_bytes(self.store.read(name))
            if not (here.complete and here.launcher == there.launcher):
                self.store.get(name, self.run.recorded)

    def _delete_other(self) -> None:
        """Delete the copy where it is of another run that had this name, before that was deleted
        in the store, or begun at the same moment: nothing of it counts for this one."""
        with suppress(*DAMAGE):  # a damaged record tells nothing
            there = Record.from_bytes(self.store.read(self.run.record.name))
            here = self.run.read_record()
            if here and here.token != there.token:
                shutil.rmtree(self.run.path)
                self.run.path.mkdir()

    def get_manifests(self) -> None:
        """Copy which checkpoints there are."""
        there = self.backup.checkpoints()
        for path in self.run.checkpoints.glob("step-*"):
            if path.name not in there:
                shutil.rmtree(path, ignore_errors=True)
        for name in there:
            path = self.run.checkpoints / name / MANIFEST
            if not path.exists():
                self.store.get(f"{name}/{MANIFEST}", path)

    def get_state(self) -> None:
        """Copy the newest checkpoint's state too, for a run that goes on from this one."""
        for name in self.backup.checkpoints()[-1:]:
            self.store.get(f"{name}/{STATE}", self.run.checkpoints / name / STATE)

    def drop_states(self) -> None:
        """Delete the states that were copied."""
        for path in self.run.checkpoints.glob(f"*/{STATE}"):
            path.unlink()


class _Follower:
    """The copy follows what the workers do, and the workers hear of the command."""

    def __init__(self, remote: CommandSide) -> None:
        self._remote = remote
        self._curve = Follower(remote.store, remote.run.journal)
        self._seen: dict[str, Seen] = {}
        self._sent: dict[str, int] = {}

    def look(self) -> None:
        """Copy what is new, either way. Raises FAULTS."""
        remote = self._remote
        for path in (remote.run.stop, remote.run.failure):
            time_of = path.stat().st_mtime_ns if path.exists() else None
            if time_of is not None and self._sent.get(path.name) != time_of:
                remote.store.put(path, path.name)
                self._sent[path.name] = time_of
        self._curve.update(remote.own_curve())
        remote.get_manifests()
        remote.get_outputs(self._seen)


def fetched(uri: str, cache: Path) -> RunDir:
    """A copy of a run in an object store, to be looked at, apart from those of commands that train.

    Raises UsageError, whose text follows the URI, where there is none or the store is down.
    """
    address, mark, options = uri.partition("?")
    storage, _, name = address.rstrip("/").rpartition("/")
    if storage.endswith("/"):
        raise UsageError("is not the URI of a run, as s3://bucket/runs/NAME-1 is")
    storage += mark + options
    run = RunDir(copies(cache, storage, "read") / name)
    remote = CommandSide(storage, run)
    try:
        if not remote.store.has(run.record.name):
            raise UsageError("is not the folder of a run (no record.json)")
        run.path.mkdir(parents=True, exist_ok=True)
        remote.fetch()
        remote.get_recorded()
    except FAULTS as error:
        raise UsageError(f"cannot be read: {reason(error)}") from None
    return run


@contextmanager
def following(storage: str, run: RunDir, say: Callable[[str], None]) -> Iterator[None]:
    """Let the command's copy of a run in an object store follow it, to its end.

    `say` is told where the store fails meanwhile. Raises RunError where it cannot be read at the
    end. A run in a folder needs none of this.
    """
    remote = CommandSide.of(storage, run)
    if remote is None:
        yield
        return
    shown = remote.store.shown
    try:
        with Repeated(_Follower(remote).look, lambda text: say(f"storage: {shown}: {text}")):
            yield
    except BaseException:
        with suppress(*FAULTS):  # the error itself is to be heard of
            remote.fetch()
        raise
    remote.insist(remote.fetch)
