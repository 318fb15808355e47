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
import hashlib
import re
import shutil
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.errors import RunError, UsageError
from pipeline.files.atomic import replacing
from pipeline.redact import redact
from pipeline.rundir.checkpoint import MANIFEST, STATE, Checkpoints
from pipeline.rundir.layout import CHECKPOINT, RunDir, facts_of
from pipeline.rundir.records import Done, Launcher, Manifest, Record, Segment

PART_BYTES = 2**22
LONGEST_COPY_SECONDS = 60.0
"""That the end of a run waits for its backup."""
FAULTS = (OSError, pa.ArrowException, ValueError, LookupError)
"""What a store may raise."""


class Backups:
    """The backups of all runs below `uri`."""

    def __init__(self, uri: str) -> None:
        """Raises UsageError for a place that is none."""
        self.uri = uri
        self.shown = redact(uri)
        try:
            if "://" in uri:
                self.filesystem, self.root = pafs.FileSystem.from_uri(uri)
            else:
                self.filesystem = pafs.LocalFileSystem()
                self.root = str(Path(uri).expanduser().resolve())
        except (OSError, pa.ArrowException, ValueError) as error:
            raise self._unusable(error) from None

    def _unusable(self, error: Exception) -> UsageError:
        return UsageError(f"checkpoint.copy_to: {self.shown} cannot be used: {reason(error)}")

    def of(self, run: str) -> Backup:
        """The backup of one run."""
        return Backup(self, run)

    def numbers(self, name: str) -> list[int]:
        """Numbers of the runs of a job that have a backup, in order. Raises UsageError."""
        try:
            names = list_names(self.filesystem, self.root)
        except OSError as error:
            raise self._unusable(error) from None
        matches = [re.fullmatch(rf"{re.escape(name)}-(\d+)", entry) for entry in names]
        return sorted(int(match[1]) for match in matches if match)


class Backup:
    """The backup of one run."""

    def __init__(self, backups: Backups, run: str) -> None:
        self.shown, self._filesystem = backups.shown, backups.filesystem
        self.folder = f"{backups.root}/{run}"
        self._segments: list[Segment] = []
        """The parts of the journal that are in the backup."""

    def launcher(self) -> Launcher | None:
        """Which command wrote the record here last, and so may write the rest. Raises FAULTS."""
        name = "record.json"
        return Record.from_bytes(self._read(name)).launcher if self._has(name) else None

    def put(self, path: Path) -> None:
        """Copy one file of the run's folder. Raises OSError."""
        self._upload(path, path.name)

    def get(self, name: str, path: Path) -> bool:
        """Copy a file back, if there is one. Raises OSError."""
        if not self._has(name):
            return False
        source = self._filesystem.open_input_stream(f"{self.folder}/{name}")
        with source, replacing(path) as file:
            shutil.copyfileobj(source, file, PART_BYTES)
        return True

    def push(self, checkpoint: Path, journal: Path, keep: int) -> None:
        """Copy a checkpoint and the journal up to it; delete all but the last. Raises OSError.

        Later ones were skipped, or the run would not have come here again.
        """
        self._push_journal(journal)
        manifest = Manifest.from_bytes((checkpoint / MANIFEST).read_bytes())
        self._upload(checkpoint / STATE, f"{checkpoint.name}/{STATE}")
        full = manifest.model_copy(update={"journal": tuple(self._segments)})
        self._put(full.to_bytes(), f"{checkpoint.name}/{MANIFEST}")
        for old in [name for name in self.checkpoints() if name <= checkpoint.name][:-keep]:
            with contextlib.suppress(FileNotFoundError):  # cut off while it was written or deleted
                self._filesystem.delete_file(f"{self.folder}/{old}/{MANIFEST}")  # it counts no more
            self._filesystem.delete_dir(f"{self.folder}/{old}")

    def push_result(self, run: RunDir) -> None:
        """Copy what a finished run has left. Raises OSError."""
        self._push_journal(run.journal)
        self._upload(run.weights, run.weights.name)
        full = Done.read(run.done).model_copy(update={"journal": tuple(self._segments)})
        self._put(full.to_bytes(), run.done.name)

    def pull(self, run: RunDir, after: int) -> tuple[int, list[str]]:
        """Copy back the newest intact checkpoint of more than `after` steps, and its journal.

        Returns its steps, 0 if there is none, and which were skipped and why. A finished run's
        result is copied back too.
        """
        skipped: list[str] = []
        if self._pull_result(run):
            return 0, skipped
        for name in reversed(self.checkpoints()):
            step = int(name.removeprefix("step-"))
            if step <= after:
                break
            path = run.checkpoint(step)
            try:
                manifest = self._manifest(name)
                journal = self._journal(manifest.journal)
                path.mkdir(parents=True, exist_ok=True)
                self.get(f"{name}/{STATE}", path / STATE)
                if facts_of(path / STATE) != manifest.files[STATE]:
                    raise ValueError(f"{STATE} is damaged")
            except FAULTS as error:  # cut off while it was written, or damaged: the one before it
                shutil.rmtree(path, ignore_errors=True)
                skipped.append(f"{name} in the backup skipped: {reason(error)}")
                continue
            with replacing(run.journal) as file:
                file.write(journal)
            manifest.model_copy(update={"journal": ()}).write(path / MANIFEST)
            self._segments = list(manifest.journal)
            return manifest.step, skipped
        return 0, skipped

    def _pull_result(self, run: RunDir) -> bool:
        try:
            done = Done.from_bytes(self._read(run.done.name))
            journal = self._journal(done.journal)
            self.get(run.weights.name, run.weights)
        except FAULTS:
            return False
        with replacing(run.journal) as file:
            file.write(journal)
        done.model_copy(update={"journal": ()}).write(run.done)
        return run.is_intact

    def _push_journal(self, journal: Path) -> None:
        """Copy what was written to the journal since the last time."""
        first = sum(segment.bytes for segment in self._segments)
        with journal.open("rb") as file:
            file.seek(first)
            content = file.read()
        content = content[: content.rfind(b"\n") + 1]
        if content:
            name = f"curve-{first:012}.jsonl"
            digest = hashlib.sha256(content).hexdigest()
            self._put(content, name)
            self._segments.append(Segment(name=name, bytes=len(content), sha256=digest))

    def _journal(self, segments: Iterable[Segment]) -> bytes:
        """The journal out of its parts. Raises ValueError if one is not what it was."""
        parts = []
        for segment in segments:
            part = self._read(Path(segment.name).name)[: segment.bytes]
            if hashlib.sha256(part).hexdigest() != segment.sha256:
                raise ValueError(f"{segment.name} is damaged")
            parts.append(part)
        return b"".join(parts)

    def _manifest(self, checkpoint: str) -> Manifest:
        try:
            return Manifest.from_bytes(self._read(f"{checkpoint}/{MANIFEST}"))
        except ValueError as error:
            raise ValueError(f"{MANIFEST}: {error}") from None

    def checkpoints(self) -> list[str]:
        """Names of the checkpoints, in order."""
        names = list_names(self._filesystem, self.folder)
        return [name for name in names if CHECKPOINT.fullmatch(name)]

    def _has(self, name: str) -> bool:
        info = self._filesystem.get_file_info(f"{self.folder}/{name}")
        return bool(info.type == pafs.FileType.File)

    def _read(self, name: str) -> bytes:
        with self._filesystem.open_input_stream(f"{self.folder}/{name}") as file:
            content: bytes = file.read()
        return content

    def _put(self, content: bytes, name: str) -> None:
        with self._open(name) as file:
            file.write(content)

    def _upload(self, path: Path, name: str) -> None:
        with path.open("rb") as source, self._open(name) as file:
            shutil.copyfileobj(source, file, PART_BYTES)

    def _open(self, name: str) -> Any:
        if isinstance(self._filesystem, pafs.LocalFileSystem):
            Path(self.folder, name).parent.mkdir(parents=True, exist_ok=True)
        return self._filesystem.open_output_stream(f"{self.folder}/{name}")


class BackupThread:
    """Keeps a run's backup up to date beside training; what fails is tried again with the next."""

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

    def update(self, wait: bool = False) -> str:
        """Copy the checkpoint being written, once it is; returns what went wrong, once.

        An earlier copy that is still on its way is left to end first.

        Raises RunError when a command on another machine has resumed the run.
        """
        if self._backup is None:
            return ""
        if wait and self._thread is not None:
            self._thread.join(LONGEST_COPY_SECONDS)
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._push, args=[self._backup], daemon=True)
            self._thread.start()
        if wait:
            self._thread.join(LONGEST_COPY_SECONDS)
            if self._thread.is_alive():
                self._fault = f"the run's copy to {self._backup.shown} has not ended yet"
        if self._superseded:
            raise self._superseded
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
            self._fault = f"the run cannot be copied to {backup.shown}: {reason(error)}"

    def _refuse_other(self, backup: Backup) -> None:
        """Raise RunError, and remember it, if another command has put its record there."""
        now = backup.launcher()
        if now and now != self._launcher:
            self._superseded = RunError(
                f"process {now.pid} on {now.host} has resumed this run from its copy in "
                f"{backup.shown}; this command writes nothing more"
            )
            raise self._superseded

    def before_result(self) -> None:
        """Let the last copy end. Raises RunError when another machine has resumed the run."""
        if self._backup is None:
            return
        if self._thread is not None:
            self._thread.join(LONGEST_COPY_SECONDS)
        with contextlib.suppress(*FAULTS):  # a store that is down says nothing
            self._refuse_other(self._backup)

    def push_result(self) -> None:
        """Copy the result of a finished run; where that fails, the run's own folder has it."""
        if self._backup is not None:
            with contextlib.suppress(*FAULTS):
                self._backup.push_result(self._run)


def list_names(filesystem: Any, folder: str) -> list[str]:
    """Names in a folder, in order; none if there is no folder. Raises OSError."""
    infos = filesystem.get_file_info(pafs.FileSelector(folder, allow_not_found=True))
    return sorted(info.base_name for info in infos)


def reason(error: Exception) -> str:
    """The first line of a file system's long texts, without secrets."""
    return redact(re.sub(r"^\[Errno \d+\] ", "", str(error).partition("\n")[0]))
