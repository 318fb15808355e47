"""Checkpoints: written to a temporary folder, checksummed, renamed; loaded without running code.

    checkpoints/step-0000000040/state.pt        the state
                                manifest.json   its size and SHA-256, and what it belongs to

There is no state of a single worker: the step determines random numbers and the position in the
data, so any number of workers can resume from a checkpoint.
"""

from __future__ import annotations

import contextlib
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
from pipeline.files.atomic import sync, sync_folder, temporary_path
from pipeline.rundir.layout import RunDir, facts_of
from pipeline.rundir.records import Identity, Manifest
from pipeline.spec import Checkpoint

FORMAT = 5
MANIFEST = "manifest.json"
STATE = "state.pt"
REPLACED = "replaced"


class Checkpoints:
    """The checkpoints of one run, written by the first worker in a thread beside training."""

    def __init__(
        self, run: RunDir, settings: Checkpoint, identity: Identity, first_step: int = 0
    ) -> None:
        self.run = run
        self.settings = settings
        self.identity = identity
        self.written = run.checkpoint(first_step) if first_step else None
        """The newest one of this attempt; before the first, the one it resumed from."""
        self._last = time.monotonic()
        self._writing: threading.Thread | None = None
        self._error: Exception | None = None
        self._is_first = True
        self._num_bytes = 0
        """Size of the tensors that were saved last."""

    def is_due(self, step: int) -> bool:
        """Whether the state after `step` steps is to be saved."""
        if self.settings.every_steps:
            return step % self.settings.every_steps == 0
        return time.monotonic() - self._last >= self.settings.every_seconds

    def save(self, step: int, snapshot: Mapping[str, Any], before: Callable[[], None]) -> None:
        """Save a state that nothing changes any more; `before` is called before it can be found.

        Waits for an earlier checkpoint that is still being written. Raises RunError when that
        failed.
        """
        self.wait()
        self._last = time.monotonic()
        self._num_bytes = num_bytes(snapshot)
        arguments = (step, snapshot, before)
        writing = threading.Thread(target=self._write, args=arguments, daemon=True)
        writing.start()
        self._writing = writing  # which the backup's thread waits for

    def wait(self) -> None:
        """Wait for the checkpoint being written. Raises RunError when the last one failed."""
        self.settle()
        if self._error is not None:
            raise RunError(
                f"a checkpoint cannot be written to {self.run.checkpoints}: "
                f"{self._reason(self._error)}; those before it are kept"
            ) from self._error

    def settle(self) -> None:
        """Wait for the checkpoint being written, whether it fails or not."""
        if self._writing is not None:
            self._writing.join()

    def _reason(self, error: Exception) -> str:
        """Why it failed; torch says of a full disk only where in its own code that showed."""
        free = shutil.disk_usage(self.run.path).free
        first_line = str(error).partition("\n")[0] or type(error).__name__
        is_full = getattr(error, "errno", None) == errno.ENOSPC
        if is_full or ("inline_container" in first_line and free < self._num_bytes):
            mebibytes = (round(number / 2**20, 1) for number in (self._num_bytes, free))
            return "No space left on device: {} MiB needed, {} free".format(*mebibytes)
        return str(getattr(error, "strerror", None) or first_line)

    def _write(self, step: int, state: Any, before: Callable[[], None]) -> None:
        final = self.run.checkpoint(step)
        temporary = temporary_path(final)
        try:
            temporary.mkdir()
            with (temporary / STATE).open("wb") as file:
                torch.save(state, file)
                sync(file)
            if self._is_first:  # what cannot be read back is said now, not after a failure
                torch.load(temporary / STATE, map_location="cpu", weights_only=True)
                self._is_first = False
            manifest = Manifest(
                format=FORMAT,
                step=step,
                identity=self.identity,
                files={STATE: facts_of(temporary / STATE)},
            )
            with (temporary / MANIFEST).open("wb") as file:
                file.write(manifest.to_bytes())
                sync(file)
            sync_folder(temporary)
            before()
            if final.exists():  # an older attempt's, found damaged or of the same state
                final.rename(temporary / REPLACED)  # fails where a successor deleted `temporary`
                shutil.rmtree(temporary / REPLACED)
            temporary.rename(final)
            sync_folder(self.run.checkpoints)
            self.written = final
            older = [saved for saved in self.run.saved_steps() if saved <= step]
            for saved in older[: -self.settings.keep]:  # later ones are damaged: they were skipped
                shutil.rmtree(self.run.checkpoint(saved))
        except Exception as error:  # a full disk shows in several ways: the run is to hear of all
            self._error = error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def newest(run: RunDir, identity: Identity, max_step: float = math.inf) -> tuple[int, list[str]]:
    """Steps done by the run's newest intact checkpoint, 0 without one.

    Only those after up to `max_step` steps count. Also says which newer ones were skipped, and why.
    """
    skipped: list[str] = []
    for saved in reversed(run.saved_steps()):
        path = run.checkpoint(saved)
        try:
            step = _check(path, identity)
            if step <= max_step:
                return step, skipped
            skipped.append(f"{path.name} skipped: the curve ends before it")
        except FileNotFoundError as error:
            skipped.append(f"{path.name} skipped: {Path(error.filename).name} is missing")
        except (OSError, ValueError) as error:
            skipped.append(f"{path.name} skipped: {error}")
    return 0, skipped


def other_format(run: RunDir) -> int | None:
    """The format of the run's checkpoints where another version of this package wrote them all."""
    found = set()
    for step in run.saved_steps():
        with contextlib.suppress(OSError, ValueError):
            found.add(Manifest.from_bytes((run.checkpoint(step) / MANIFEST).read_bytes()).format)
    return max(found) if found and FORMAT not in found else None


def _check(path: Path, identity: Identity) -> int:
    """The step of an intact checkpoint. Raises ValueError or OSError when it is not."""
    try:
        manifest = Manifest.from_bytes((path / MANIFEST).read_bytes())
    except ValueError as error:
        raise ValueError(f"{MANIFEST}: {error}") from None
    if manifest.format != FORMAT:
        raise ValueError(f"format {manifest.format}, this version reads {FORMAT}")
    for key, one, other in (
        ("spec", manifest.identity.spec, identity.spec),
        ("data", manifest.identity.data, identity.data),
    ):
        if one != other:
            raise ValueError(f"it belongs to another {key}")
    for name, facts in manifest.files.items():
        if facts_of(path / Path(name).name) != facts:
            raise ValueError(f"{name} is damaged")
    return manifest.step


def load(run: RunDir, step: int) -> Any:
    """The state saved after `step` steps, on the CPU. No code is run."""
    return torch.load(run.checkpoint(step) / STATE, map_location="cpu", weights_only=True)


def num_bytes(value: Any) -> int:
    """Bytes of all tensors in the structure."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    inside = value.values() if isinstance(value, Mapping) else value
    return sum(map(num_bytes, inside)) if isinstance(value, Mapping | list | tuple) else 0
