"""The backup of a run where its disk is not: in an object store, or on another disk.

    COPY_TO/NAME-1/record.json                  what MLflow is told, with the run's token
                   step-0000000040/state.pt     as in the run's own folder
                                   manifest.json   last: with size and SHA-256 of what it needs
                   curve-000000000000.jsonl     the journal, cut at each checkpoint, by first byte
                   weights.pt, done.json        of a finished run

There is no renaming in an object store: what no manifest names does not count. Of two machines that
both write here, the one whose command put its record here last continues; the other one stops.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import RunError, UsageError
from pipeline.files.atomic import replacing
from pipeline.files.store import DAMAGE, FAULTS, Store, reason
from pipeline.rundir import pieces
from pipeline.rundir.checkpoint import MANIFEST, STATE, Checkpoints
from pipeline.rundir.layout import CHECKPOINT, RunDir, facts_of
from pipeline.rundir.pieces import Pieces
from pipeline.rundir.records import Done, FileFacts, Identity, Launcher, Manifest, Record


class Backups:
    """The backups of all runs below `uri`."""

    def __init__(self, uri: str, key: str = "checkpoint.copy_to") -> None:
        """`key` of the spec names it. Raises UsageError for a place that is none."""
        self.uri, self.key = uri, key
        self.store = Store.at(uri, key)
        self.shown = self.store.shown

    def of(self, run: str) -> Backup:
        """The backup of one run."""
        return Backup(self.store.below(run))

    def numbers(self, name: str) -> list[int]:
        """Numbers of the runs of a job that have a backup, in order. Raises UsageError."""
        try:
            names = self.store.names()
        except OSError as error:
            raise UsageError(f"{self.key}: {self.shown} cannot be used: {reason(error)}") from None
        matches = [re.fullmatch(rf"{re.escape(name)}-(\d+)", entry) for entry in names]
        return sorted(int(match[1]) for match in matches if match)


class Backup:
    """The backup of one run."""

    def __init__(self, store: Store, mark: str = "") -> None:
        """`mark` tells the pieces of its curve from those of others that write here."""
        self.store = store
        self.mark = mark
        self.pieces = Pieces(store, mark=mark)

    def launcher(self) -> Launcher | None:
        """Which command wrote the record here last, and so may write the rest. Raises FAULTS."""
        name = "record.json"
        return Record.from_bytes(self.store.read(name)).launcher if self.store.has(name) else None

    def push(self, checkpoint: Path, journal: Path, keep: int) -> None:
        """Copy a checkpoint and the journal up to it; delete all but the last. Raises OSError.

        Later ones were skipped, or the run would not have come here again.
        """
        self.pieces.push(journal, closes=True)
        manifest = Manifest.from_bytes((checkpoint / MANIFEST).read_bytes())
        self.store.put(checkpoint / STATE, f"{checkpoint.name}/{STATE}")
        full = manifest.model_copy(update={"journal": tuple(self.pieces.all)})
        self.store.write(full.to_bytes(), f"{checkpoint.name}/{MANIFEST}")
        for old in [name for name in self.checkpoints() if name <= checkpoint.name][:-keep]:
            self.store.delete(f"{old}/{MANIFEST}")  # it counts no more
            self.store.delete_folder(old)

    def push_result(self, run: RunDir) -> None:
        """Copy what a finished run has left. Raises OSError."""
        self.pieces.push(run.journal, closes=True)
        self.store.put(run.weights, run.weights.name)
        full = Done.read(run.done).model_copy(update={"journal": tuple(self.pieces.all)})
        self.store.write(full.to_bytes(), run.done.name)

    def pull(self, run: RunDir, after: int) -> tuple[int, list[str]]:
        """Copy back the newest intact checkpoint of more than `after` steps, and its journal.

        Returns its steps, 0 if there is none, and which were skipped and why. A finished run's
        result is copied back too.
        """
        with contextlib.suppress(*DAMAGE):
            if self.pull_result(run):
                return 0, []
        return self.pull_checkpoint(run, after)

    def pull_checkpoint(
        self, run: RunDir, after: int, of: Identity | None = None
    ) -> tuple[int, list[str]]:
        """The same, whether the run is finished or not; only what belongs to the spec and rows `of`
        something, where that is given."""
        skipped: list[str] = []
        for name in reversed(self.checkpoints()):
            step = int(name.removeprefix("step-"))
            if step <= after:
                break
            path = run.checkpoint(step)
            try:
                manifest = self._manifest(name)
                if of and (manifest.identity.spec, manifest.identity.data) != (of.spec, of.data):
                    raise ValueError("it belongs to another job")
                journal = pieces.joined(self.store, manifest.journal)
                self._pull_state(name, path / STATE, manifest.files[STATE])
            except DAMAGE as error:  # cut off while it was written, or damaged: the one before it
                shutil.rmtree(path, ignore_errors=True)
                skipped.append(f"{name} in the backup skipped: {reason(error)}")
                continue
            with replacing(run.journal) as file:
                file.write(journal)
            manifest.model_copy(update={"journal": ()}).write(path / MANIFEST)
            self.pieces = Pieces(self.store, manifest.journal, self.mark)
            return manifest.step, skipped
        return 0, skipped

    def _pull_state(self, name: str, path: Path, facts: FileFacts) -> None:
        """A checkpoint's state, where it is not here already. Raises ValueError for another."""
        if path.exists() and facts_of(path) == facts:
            return
        self.store.get(f"{name}/{STATE}", path)
        if facts_of(path) != facts:
            raise ValueError(f"{STATE} is damaged")

    def pull_result(self, run: RunDir) -> bool:
        """Copy back a finished run's result, where it is not here; whether it is intact then.

        Raises DAMAGE where there is none.
        """
        done = Done.from_bytes(self.store.read(run.done.name))
        if not _is_there(run.journal, done):
            journal = pieces.joined(self.store, done.journal)
            with replacing(run.journal) as file:
                file.write(journal)
        if not _is_there(run.weights, done):
            self.store.get(run.weights.name, run.weights)
        done.model_copy(update={"journal": ()}).write(run.done)
        return run.is_intact

    def _manifest(self, checkpoint: str) -> Manifest:
        try:
            return Manifest.from_bytes(self.store.read(f"{checkpoint}/{MANIFEST}"))
        except ValueError as error:
            raise ValueError(f"{MANIFEST}: {error}") from None

    def checkpoints(self) -> list[str]:
        """Names of the checkpoints, in order."""
        return [name for name in self.store.names() if CHECKPOINT.fullmatch(name)]


def _is_there(path: Path, done: Done) -> bool:
    """Whether a file of the result is here already."""
    return path.exists() and facts_of(path) == done.files.get(path.name)


class BackupThread:
    """Keeps a run's backup up to date beside training; what fails is tried again with the next."""

    patience: float | None = 60.0
    """Seconds that the end of a run waits for it; without a limit, None."""

    def __init__(
        self,
        run: RunDir,
        checkpoints: Checkpoints,
        backup: Backup | None,
        check: Callable[[], None],
    ) -> None:
        """Without a `backup` there is nothing to do. `check` is the lease's."""
        self._run = run
        self._checkpoints = checkpoints
        self._backup = backup
        self._check = check
        record = run.read_record() if backup else None
        self._launcher = record.launcher if record else None
        self._thread: threading.Thread | None = None
        self._pushed: Path | None = None
        self._fault, self._told = "", ""
        self._superseded: RunError | None = None

    def open(self) -> None:
        """Training begins."""

    def close(self) -> None:
        """Training has ended."""

    def refuse_superseded(self) -> None:
        """Raise RunError when it is known that a command on another machine has resumed the run."""
        if self._superseded:
            raise self._superseded

    def update(self, wait: bool = False) -> str:
        """Copy the checkpoint being written, once it is; returns what went wrong, once.

        An earlier copy that is still on its way is left to end first.

        Raises RunError when a command on another machine has resumed the run.
        """
        if self._backup is None:
            return ""
        if wait and self._thread is not None:
            self._thread.join(self.patience)
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._push, args=[self._backup], daemon=True)
            self._thread.start()
        if wait:
            self._thread.join(self.patience)
            if self._thread.is_alive():
                self._fault = f"the run's copy to {self._backup.store.shown} has not ended yet"
        self.refuse_superseded()
        is_new = self._fault != self._told
        self._told = self._fault
        return self._fault if is_new else ""

    def _push(self, backup: Backup) -> None:
        try:
            self._checkpoints.settle()
            self._check()
            checkpoint = self._checkpoints.written
            if checkpoint and checkpoint != self._pushed:
                self._refuse_other(backup)
                keep = self._checkpoints.settings.keep
                backup.push(checkpoint, self._run.journal, keep)
                self._pushed = checkpoint
            self._fault = ""
        except (*FAULTS, RunError) as error:
            self._fault = f"the run cannot be copied to {backup.store.shown}: {reason(error)}"

    def _refuse_other(self, backup: Backup) -> None:
        """Raise RunError, and remember it, if another command has put its record there."""
        now = backup.launcher()
        if now and now != self._launcher:
            self._superseded = RunError(
                f"process {now.pid} on {now.host} has resumed this run from its copy in "
                f"{backup.store.shown}; this command writes nothing more"
            )
            raise self._superseded

    def before_result(self) -> None:
        """Let the last copy end. Raises RunError when another machine has resumed the run."""
        if self._backup is None:
            return
        if self._thread is not None:
            self._thread.join(self.patience)
        with contextlib.suppress(*FAULTS):  # a store that is down says nothing
            self._refuse_other(self._backup)

    def push_result(self) -> None:
        """Copy the result of a finished run; where that fails, the run's own folder has it."""
        if self._backup is not None:
            with contextlib.suppress(*FAULTS):
                self._backup.push_result(self._run)
