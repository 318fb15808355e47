"""A copy of a run where its disk is not: in an object store, or on another disk.

    COPY_TO/NAME-1/record.json                  what MLflow is told, with the run's token
                   step-0000000040/state.pt     as in the run's own folder
                                   manifest.json   last: with size and SHA-256 of what it needs
                   curve-000000000000.jsonl     the journal, cut at each checkpoint, by first byte
                   weights.pt, done.json        of a finished run

There is no renaming in an object store: what no manifest speaks of does not count. Of two machines
that both write here, the one whose command put its record here last goes on; the other one stops.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.errors import UsageError
from pipeline.redact import redacted
from pipeline.train import files
from pipeline.train.checkpoint import MANIFEST, STATE

PART_BYTES = 2**22
FAULTS = (OSError, pa.ArrowException, ValueError, LookupError)


class Mirror:
    """The copy of one run, or of all runs of a job, below `uri`."""

    def __init__(self, uri: str, run: str = "") -> None:
        """Raises UsageError for a place that is none."""
        self.uri, self.shown = uri, redacted(uri)
        try:
            if "://" in uri:
                self._filesystem, self._root = pafs.FileSystem.from_uri(uri)
            else:
                self._filesystem = pafs.LocalFileSystem()
                self._root = str(Path(uri).expanduser().resolve())
        except (OSError, pa.ArrowException, ValueError) as error:
            raise self._unusable(error) from None
        self.folder = f"{self._root}/{run}" if run else self._root
        self._segments: list[list[Any]] = []  # name, bytes, SHA-256

    def _unusable(self, error: Exception) -> UsageError:
        return UsageError(f"checkpoint.copy_to: {self.shown} cannot be used: {reason(error)}")

    def of(self, run: str) -> Mirror:
        """The copy of one of the job's runs."""
        return Mirror(self.uri, run)

    def runs(self, name: str) -> list[int]:
        """Numbers of the job's runs that have a copy, in order."""
        try:
            found = self._listed(self.folder)
        except OSError as error:
            raise self._unusable(error) from None
        numbered = [re.fullmatch(rf"{re.escape(name)}-(\d+)", place) for place in found]
        return sorted(int(match[1]) for match in numbered if match)

    def launcher(self) -> dict[str, Any] | None:
        """Which command wrote the record here last, and so may write the rest. Raises FAULTS."""
        info = self._filesystem.get_file_info(f"{self.folder}/{files.RECORD}")
        if info.type != pafs.FileType.File:
            return None
        found: dict[str, Any] | None = self._manifest(files.RECORD).get("launcher")
        return found

    def put(self, path: Path) -> None:
        """Copy one file of the run's folder. Raises OSError."""
        self._put(path.read_bytes(), path.name)

    def get(self, name: str, path: Path) -> bool:
        """Copy a file back, whether there is one. Raises OSError."""
        info = self._filesystem.get_file_info(f"{self.folder}/{name}")
        if info.type != pafs.FileType.File:
            return False
        source = self._filesystem.open_input_stream(f"{self.folder}/{name}")
        with source, files.replacing(path) as file:
            while part := source.read(PART_BYTES):
                file.write(part)
        return True

    def push(self, place: Path, journal: Path, keep: int) -> None:
        """Copy a checkpoint and the journal up to it; delete all but the last. Raises OSError.

        Later ones were passed over, or the run would not have come here again.
        """
        self._push_curve(journal)
        manifest = files.unsealed((place / MANIFEST).read_bytes())  # while it is still kept
        self._upload(place / STATE, f"{place.name}/{STATE}")
        sealed = files.sealed({**manifest, "curve": self._segments})
        self._put(files.text_of(sealed), f"{place.name}/{MANIFEST}")
        for old in [name for name in self.steps() if name <= place.name][:-keep]:
            with contextlib.suppress(FileNotFoundError):  # cut off while it was written or deleted
                self._filesystem.delete_file(f"{self.folder}/{old}/{MANIFEST}")  # it counts no more
            self._filesystem.delete_dir(f"{self.folder}/{old}")

    def push_result(self, folder: Path) -> None:
        """Copy what a finished run has left. Raises OSError."""
        self._push_curve(folder / files.CURVE)
        self._upload(folder / files.WEIGHTS, files.WEIGHTS)
        done = files.read_json(folder / files.DONE)
        sealed = files.sealed({**done, "curve": self._segments})
        self._put(files.text_of(sealed), files.DONE)

    def pull(self, folder: Path, after: int) -> tuple[int, list[str]]:
        """Copy back the newest whole checkpoint of more than `after` steps, and its journal.

        Returns its steps, 0 if there is none, and which were passed over and why. A finished run's
        result is copied back too.
        """
        passed: list[str] = []
        if self._pull_result(folder):
            return 0, passed
        for name in reversed(self.steps()):
            if int(name.removeprefix("step-")) <= after:
                break
            place = folder / "checkpoints" / name
            try:
                manifest = self._manifest(f"{name}/{MANIFEST}")
                segments = manifest.pop("curve")
                curve = self._curve(segments)
                place.mkdir(parents=True, exist_ok=True)
                self.get(f"{name}/{STATE}", place / STATE)
                if files.sha256(place / STATE) != manifest["files"][STATE]["sha256"]:
                    raise ValueError(f"{STATE} is damaged")
            except FAULTS as error:  # cut off while it was written, or damaged: the one before it
                shutil.rmtree(place, ignore_errors=True)
                passed.append(f"{name} in the copy passed over: {reason(error)}")
                continue
            with files.replacing(folder / files.CURVE) as file:
                file.write(curve)
            (place / MANIFEST).write_bytes(files.text_of(files.sealed(manifest)))
            self._segments = segments
            return int(manifest["step"]), passed
        return 0, passed

    def _pull_result(self, folder: Path) -> bool:
        try:
            done = self._manifest(files.DONE)
            curve = self._curve(done.pop("curve"))
            self.get(files.WEIGHTS, folder / files.WEIGHTS)
        except FAULTS:
            return False
        with files.replacing(folder / files.CURVE) as file:
            file.write(curve)
        files.write_json(folder / files.DONE, done)
        return files.is_done(folder)

    def _push_curve(self, journal: Path) -> None:
        """Copy what was written to the journal since the last time."""
        first = sum(size for _, size, _ in self._segments)
        with journal.open("rb") as file:
            file.seek(first)
            content = file.read()
        content = content[: content.rfind(b"\n") + 1]
        if content:
            name = f"curve-{first:012}.jsonl"
            self._put(content, name)
            self._segments.append([name, len(content), hashlib.sha256(content).hexdigest()])

    def _curve(self, segments: list[list[Any]]) -> bytes:
        """The journal out of its parts. Raises ValueError if one is not what it was."""
        parts = []
        for name, size, digest in segments:
            part = self._read(Path(name).name)[:size]
            if hashlib.sha256(part).hexdigest() != digest:
                raise ValueError(f"{name} is damaged")
            parts.append(part)
        return b"".join(parts)

    def _manifest(self, name: str) -> dict[str, Any]:
        try:
            return files.unsealed(self._read(name))
        except ValueError:
            raise ValueError(f"{Path(name).name} is damaged") from None

    def steps(self) -> list[str]:
        """Names of the checkpoints, in order."""
        return [name for name in self._listed(self.folder) if re.fullmatch(r"step-\d{10}", name)]

    def _listed(self, folder: str) -> list[str]:
        found = self._filesystem.get_file_info(pafs.FileSelector(folder, allow_not_found=True))
        return sorted(info.base_name for info in found)

    def _read(self, name: str) -> bytes:
        with self._filesystem.open_input_stream(f"{self.folder}/{name}") as file:
            content: bytes = file.read()
        return content

    def _put(self, content: bytes, name: str) -> None:
        with self._open(name) as file:
            file.write(content)

    def _upload(self, path: Path, name: str) -> None:
        with path.open("rb") as source, self._open(name) as file:
            while part := source.read(PART_BYTES):
                file.write(part)

    def _open(self, name: str) -> Any:
        if isinstance(self._filesystem, pafs.LocalFileSystem):
            Path(self.folder, name).parent.mkdir(parents=True, exist_ok=True)
        return self._filesystem.open_output_stream(f"{self.folder}/{name}")


def reason(error: Exception) -> str:
    """The first line of a file system's long texts, without secrets."""
    return redacted(re.sub(r"^\[Errno \d+\] ", "", str(error).partition("\n")[0]))
