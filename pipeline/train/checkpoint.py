"""State on disk: written aside, checksummed, renamed; loaded without unpickling code.

    checkpoints/step-0000000040/state.pt        weights, buffers, optimizer
                                manifest.json   size and SHA-256 of state.pt, and what it belongs to

There is no state of a single worker: random numbers and the place in the data follow from the step,
so any number of workers can go on from a checkpoint.
"""

from __future__ import annotations

import errno
import math
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import RunError
from pipeline.spec import Checkpoint
from pipeline.train import files

FORMAT = 2
MANIFEST, STATE, REPLACED = "manifest.json", "state.pt", "replaced"


class Checkpoints:
    """The checkpoints of one run, written by the first worker in a thread beside training."""

    def __init__(
        self, folder: Path, settings: Checkpoint, identity: dict[str, Any], first_step: int = 0
    ) -> None:
        self.folder, self.settings, self.identity = folder / "checkpoints", settings, identity
        self.folder.mkdir(exist_ok=True)
        self._last = time.monotonic()
        self.written = _place(self.folder, first_step) if first_step else None
        """The newest one of this attempt; before the first, the one it goes on from."""
        self._writing: threading.Thread | None = None
        self._error: Exception | None = None
        self._is_first = True
        self._num_bytes = 0
        """Of the tensors that were saved last."""

    def is_due(self, step: int) -> bool:
        """Whether the state after `step` steps is to be saved."""
        if self.settings.every_steps:
            return step % self.settings.every_steps == 0
        return time.monotonic() - self._last >= self.settings.every_seconds

    def save(self, step: int, snapshot: dict[str, Any], before: Callable[[], None]) -> None:
        """Save a state that nothing changes any more; `before` runs before it can be found.

        Waits for an earlier checkpoint that is still being written. Raises RunError when that
        could not be.
        """
        self.wait()
        self._last = time.monotonic()
        self._num_bytes = num_bytes(snapshot)
        arguments = (step, snapshot, before)
        writing = threading.Thread(target=self._write, args=arguments, daemon=True)
        writing.start()
        self._writing = writing  # which the copy's thread waits for

    def wait(self) -> None:
        """Until no checkpoint is being written. Raises RunError when the last one could not be."""
        self.settle()
        if self._error is not None:
            raise RunError(
                f"a checkpoint cannot be written to {self.folder}: {self._reason(self._error)}; "
                "those before it are kept"
            ) from self._error

    def _reason(self, error: Exception) -> str:
        """Why it could not; torch says of a full disk only where in its own code that showed."""
        free = shutil.disk_usage(self.folder).free
        told = str(error).partition("\n")[0] or type(error).__name__
        reason = str(getattr(error, "strerror", None) or told)
        is_full = getattr(error, "errno", None) == errno.ENOSPC
        if is_full or ("inline_container" in told and free < self._num_bytes):
            mebibytes = (round(number / 2**20, 1) for number in (self._num_bytes, free))
            return "No space left on device: {} MiB needed, {} free".format(*mebibytes)
        return reason

    def settle(self) -> None:
        """Until no checkpoint is being written; whether it could be is not asked."""
        if self._writing is not None:
            self._writing.join()

    def _write(self, step: int, state: Any, before: Callable[[], None]) -> None:
        final = _place(self.folder, step)
        aside = files.beside(final)
        try:
            aside.mkdir()
            with (aside / STATE).open("wb") as file:
                torch.save(state, file)
                files.to_disk(file)
            if self._is_first:  # what cannot be read back is said now, not after a failure
                torch.load(aside / STATE, map_location="cpu", weights_only=True)
                self._is_first = False
            facts = {"bytes": (aside / STATE).stat().st_size, "sha256": files.sha256(aside / STATE)}
            manifest = {
                "format": FORMAT, "step": step, "identity": self.identity, "files": {STATE: facts}
            }  # fmt: skip
            with (aside / MANIFEST).open("wb") as file:
                file.write(files.text_of(files.sealed(manifest)))
                files.to_disk(file)
            files.folder_to_disk(aside)
            before()
            if final.exists():  # an older attempt's, found damaged or of the same state
                final.rename(aside / REPLACED)  # fails where a successor has deleted `aside`
                shutil.rmtree(aside / REPLACED)
            aside.rename(final)
            files.folder_to_disk(self.folder)
            self.written = final
            done = [place for place in sorted(self.folder.glob("step-*")) if place <= final]
            for old in done[: -self.settings.keep]:  # later ones are damaged: they were passed over
                shutil.rmtree(old)
        except Exception as error:  # a full disk shows in several ways: the run is to hear of all
            self._error = error
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def newest(
    folder: Path, identity: Mapping[str, Any], most: float = math.inf
) -> tuple[int, list[str]]:
    """Steps done by the newest valid checkpoint of the run in `folder`, 0 without one.

    Only those after up to so `most` steps count. Also says which newer ones were passed over, and
    why.
    """
    passed: list[str] = []
    for place in sorted(folder.glob(files.CHECKPOINTS), reverse=True):
        try:
            step = _checked(place, identity)
            if step <= most:
                return step, passed
            passed.append(f"{place.name} passed over: the curve ends before it")
        except FileNotFoundError as error:
            passed.append(f"{place.name} passed over: {Path(error.filename).name} is missing")
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            passed.append(f"{place.name} passed over: {error}")
    return 0, passed


def _checked(place: Path, identity: Mapping[str, Any]) -> int:
    """The step of a checkpoint that is whole. Raises ValueError and others when it is not."""
    try:
        manifest = files.unsealed((place / MANIFEST).read_bytes())
    except ValueError:
        raise ValueError(f"{MANIFEST} is damaged") from None
    if manifest["format"] != FORMAT:
        raise ValueError(f"format {manifest['format']}, this version reads {FORMAT}")
    for key in ("spec", "data"):
        if manifest["identity"][key] != identity[key]:
            raise ValueError(f"it belongs to another {key}")
    for name, facts in manifest["files"].items():
        file = place / Path(name).name
        if file.stat().st_size != facts["bytes"] or files.sha256(file) != facts["sha256"]:
            raise ValueError(f"{name} is damaged")
    return int(manifest["step"])


def load(folder: Path, step: int) -> Any:
    """The state saved after `step` steps, on the CPU. No code is run."""
    place = _place(folder / "checkpoints", step)
    return torch.load(place / STATE, map_location="cpu", weights_only=True)


def _place(folder: Path, step: int) -> Path:
    return folder / f"step-{step:010}"


def num_bytes(value: Any) -> int:
    """Bytes of all tensors in the structure."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    inside = value.values() if isinstance(value, Mapping) else value
    return sum(map(num_bytes, inside)) if isinstance(value, Mapping | list | tuple) else 0
