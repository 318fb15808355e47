"""The folder of one run: the name of every file in it, its lock, and whether it is finished."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.errors import UsageError
from pipeline.files.atomic import sha256
from pipeline.rundir.records import Done, Ended, FileFacts, Record, Recorded

CHECKPOINT = re.compile(r"step-(?P<step>\d{10,})")
"""Name of a checkpoint's folder, here and in a backup."""
INPUTS = ("record.json", "spec.yaml", "initial.pt", "parent.json", "imports/*")
"""Files that the workers get from the command, where they do not see its folder."""
OUTPUTS = ("nonfinite.json", "held_out.npz", "importance.json", "traceback-*.txt", "output/*.txt",
           "system/*.jsonl")  # fmt: skip
"""Files that the workers write beside curve, checkpoints and result."""


@dataclass(frozen=True)
class RunDir:
    """A run's folder, of which each file has its path here."""

    path: Path

    @property
    def name(self) -> str:
        """The run's name, JOB-NUMBER."""
        return self.path.name

    # written by the command

    @property
    def spec(self) -> Path:
        """The spec as it is trained, for people."""
        return self.path / "spec.yaml"

    @property
    def record(self) -> Path:
        """What MLflow is told besides the curve."""
        return self.path / "record.json"

    @property
    def imports(self) -> Path:
        """Custom modules, as they were when the run began."""
        return self.path / "imports"

    @property
    def initial(self) -> Path:
        """The weights that the model starts from, with `model.init_from`."""
        return self.path / "initial.pt"

    @property
    def stop(self) -> Path:
        """Asks the workers to save their state and end."""
        return self.path / "stop"

    @property
    def ended(self) -> Path:
        """How training ended."""
        return self.path / "ended.json"

    @property
    def parent(self) -> Path:
        """The finished run that this one goes on from, if there is one."""
        return self.path / "parent.json"

    # written by the first worker

    @property
    def lease(self) -> Path:
        """Which process may write the files below."""
        return self.path / "lease.json"

    @property
    def journal(self) -> Path:
        """The curve."""
        return self.path / "curve.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def nonfinite(self) -> Path:
        """The last step that was not finite, and all rows it comes from."""
        return self.path / "nonfinite.json"

    @property
    def held_out(self) -> Path:
        """What the trained weights predict for validation rows."""
        return self.path / "held_out.npz"

    @property
    def importance(self) -> Path:
        """How much the trained model relies on each input."""
        return self.path / "importance.json"

    @property
    def weights(self) -> Path:
        """The trained weights."""
        return self.path / "weights.pt"

    @property
    def done(self) -> Path:
        """The result of a finished run."""
        return self.path / "done.json"

    # written by others

    @property
    def failure(self) -> Path:
        """Why workers are started again, in Ray's words."""
        return self.path / "failure.txt"

    def traceback(self, rank: int) -> Path:
        """An error of custom code on a worker."""
        return self.path / f"traceback-{rank}.txt"

    def output(self, rank: int) -> Path:
        """What a worker and its libraries print."""
        return self.path / "output" / f"worker-{rank}.txt"

    @property
    def tracebacks(self) -> list[Path]:
        """The traceback files of all workers, in order."""
        return sorted(self.path.glob("traceback-*.txt"))

    @property
    def system(self) -> Path:
        """The folder of readings of the machines' load, a file for each worker that takes them."""
        return self.path / "system"

    @property
    def recorded(self) -> Path:
        """How much of the run MLflow has."""
        return self.path / "recorded.json"

    @property
    def uploader_log(self) -> Path:
        """What went wrong on the way to MLflow."""
        return self.path / "upload.log"

    @property
    def uploader_lock(self) -> Path:
        """Held by the process that sends the run to MLflow."""
        return self.path / ".uploading"

    def fault_mark(self, rank: int, step: int) -> Path:
        """Left by a planned fault that has struck."""
        return self.path / f".fault-{rank}-{step}"

    def inputs(self) -> list[Path]:
        """Files that workers get from the command, of those that there are."""
        return [path for path in self._files() if self.is_input(self.relative(path))]

    def outputs(self) -> list[Path]:
        """Files of the workers beside curve, checkpoints and result, of those that there are."""
        return [path for path in self._files() if self.is_output(self.relative(path))]

    def is_input(self, name: str) -> bool:
        """Whether workers get such a file from the command."""
        return any(fnmatchcase(name, pattern) for pattern in INPUTS)

    def is_output(self, name: str) -> bool:
        """Whether workers write such a file beside curve, checkpoints and result."""
        return any(fnmatchcase(name, pattern) for pattern in OUTPUTS)

    def _files(self) -> list[Path]:
        return [path for path in sorted(self.path.rglob("*")) if path.is_file()]

    def relative(self, path: Path) -> str:
        """The name of one of its files, with its folders."""
        return path.relative_to(self.path).as_posix()

    # contents

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint after `step` steps."""
        return self.checkpoints / f"step-{step:010}"

    def saved_steps(self) -> list[int]:
        """Steps of the checkpoints that are there, intact or not, in order."""
        matches = [CHECKPOINT.fullmatch(path.name) for path in self.checkpoints.glob("step-*")]
        return sorted(int(match["step"]) for match in matches if match)

    @property
    def is_finished(self) -> bool:
        """Whether `done.json` is there. Does not look at the other files: see `damage`."""
        return self.done.exists()

    @property
    def is_intact(self) -> bool:
        """Whether the last step is done, and journal and weights are as they were written.

        Reads all of them.
        """
        return self.is_finished and not self.damage()

    def damage(self) -> str:
        """Why the files of a finished run are invalid; empty if they are not, or it is unfinished.

        Reads journal and weights completely.
        """
        if not self.is_finished:
            return ""
        try:
            files = Done.read(self.done).files
        except (OSError, ValueError):
            return f"{self.done.name} is damaged"
        for path in (self.journal, self.weights):
            if not path.exists():
                return f"{path.name} is missing"
            if path.name not in files or facts_of(path) != files[path.name]:
                return f"{path.name} is damaged"
        return ""

    def read_record(self) -> Record | None:
        """What MLflow is told; None without it. Raises ValueError if it is damaged."""
        return Record.read(self.record) if self.record.exists() else None

    def read_recorded(self) -> Recorded:
        """How much MLflow has; nothing if that is not known."""
        try:
            return Recorded.read(self.recorded)
        except (OSError, ValueError):
            return Recorded(error=f"nothing is recorded: see {self.uploader_log}")

    def read_done(self) -> Done | None:
        """The result; None if the run is not finished, or it is damaged. See `damage`."""
        try:
            return Done.read(self.done)
        except (OSError, ValueError):
            return None

    def read_ended(self) -> Ended | None:
        """How training ended; None if nobody has written it, or it is damaged."""
        try:
            return Ended.read(self.ended)
        except (OSError, ValueError):
            return None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other commands out of the run while this one trains or records it.

        The kernel releases the lock, however this process ends. Raises UsageError when another
        process has it.
        """
        holder = self.path / ".lock-holder"
        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            name = holder.read_text() if holder.exists() else "another command"
            raise UsageError(
                f"{self.name} is being trained or recorded right now, by {name}; wait for it, or "
                "start another run with --fresh"
            ) from None
        try:
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
            yield
        finally:
            holder.unlink(missing_ok=True)
            lock.release()


def facts_of(path: Path) -> FileFacts:
    """Size and SHA-256 of a file."""
    return FileFacts(bytes=path.stat().st_size, sha256=sha256(path))
