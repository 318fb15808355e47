"""State on disk: written aside, checksummed, renamed; loaded without unpickling code.

    checkpoints/step-0000000040/state.pt        weights, buffers, optimizer
                                manifest.json   size and SHA-256 of state.pt, and what it belongs to

There is no state of a single worker: random numbers and the place in the data follow from the step,
so any number of workers can go on from a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import RunError
from pipeline.spec import Checkpoint

FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.pt"


class Checkpoints:
    """The checkpoints of one run, written by the first worker in a thread beside training."""

    def __init__(self, folder: Path, settings: Checkpoint, identity: dict[str, Any]) -> None:
        self.folder, self.settings, self.identity = folder / "checkpoints", settings, identity
        self.folder.mkdir(exist_ok=True)
        for unfinished in self.folder.glob(".aside-*"):
            shutil.rmtree(unfinished)
        self._last = time.monotonic()
        self._writing: threading.Thread | None = None
        self._error: OSError | None = None

    def is_due(self, step: int) -> bool:
        """Whether the state after `step` steps is to be saved."""
        if self.settings.every_steps:
            return step % self.settings.every_steps == 0
        return time.monotonic() - self._last >= self.settings.every_seconds

    def save(self, step: int, state: Any, before: Callable[[], None]) -> None:
        """Save `state`, copied before this returns; `before` runs before it can be found.

        Waits for an earlier checkpoint that is still being written. Raises RunError when that
        could not be.
        """
        self.wait()
        self._last = time.monotonic()
        arguments = (step, _copied(state), before)
        self._writing = threading.Thread(target=self._write, args=arguments, daemon=True)
        self._writing.start()

    def wait(self) -> None:
        """Until no checkpoint is being written. Raises RunError when the last one could not be."""
        if self._writing is not None:
            self._writing.join()
        if self._error is not None:
            raise RunError(
                f"a checkpoint cannot be written to {self.folder}: {self._error.strerror}; "
                "those before it are kept"
            )

    def _write(self, step: int, state: Any, before: Callable[[], None]) -> None:
        aside = self.folder / f".aside-{step}-{os.getpid()}"
        try:
            aside.mkdir()
            with (aside / STATE).open("wb") as file:
                torch.save(state, file)
                _to_disk(file)
            facts = {"bytes": (aside / STATE).stat().st_size, "sha256": _sha256(aside / STATE)}
            manifest = {
                "format": FORMAT, "step": step, "identity": self.identity, "files": {STATE: facts}
            }  # fmt: skip
            with (aside / MANIFEST).open("w") as text:
                json.dump({**manifest, "sha256": _digest(manifest)}, text, indent=1)
                _to_disk(text)
            _folder_to_disk(aside)
            before()
            final = _place(self.folder, step)
            if final.exists():  # an older attempt's, found damaged or of the same state
                shutil.rmtree(final)
            aside.rename(final)
            _folder_to_disk(self.folder)
            for old in sorted(self.folder.glob("step-*"))[: -self.settings.keep]:
                shutil.rmtree(old)
        except OSError as error:
            self._error = error
            shutil.rmtree(aside, ignore_errors=True)


def newest(folder: Path, identity: Mapping[str, Any]) -> tuple[int, list[str]]:
    """Steps done by the newest valid checkpoint of the run in `folder`, 0 without one.

    Also says which newer ones were passed over, and why.
    """
    passed: list[str] = []
    for place in sorted((folder / "checkpoints").glob("step-*"), reverse=True):
        try:
            return _checked(place, identity), passed
        except (OSError, ValueError, KeyError, TypeError) as error:
            passed.append(f"{place.name} passed over: {error}")
    return 0, passed


def _checked(place: Path, identity: Mapping[str, Any]) -> int:
    """The step of a checkpoint that is whole. Raises ValueError and others when it is not."""
    manifest = json.loads((place / MANIFEST).read_bytes())
    if manifest.pop("sha256") != _digest(manifest):
        raise ValueError(f"{MANIFEST} is damaged")
    if manifest["format"] != FORMAT:
        raise ValueError(f"format {manifest['format']}, this version reads {FORMAT}")
    for key in ("spec", "data"):
        if manifest["identity"][key] != identity[key]:
            raise ValueError(f"it belongs to another {key}")
    for name, facts in manifest["files"].items():
        file = place / Path(name).name
        if file.stat().st_size != facts["bytes"] or _sha256(file) != facts["sha256"]:
            raise ValueError(f"{name} is damaged")
    return int(manifest["step"])


def load(folder: Path, step: int) -> Any:
    """The state saved after `step` steps, on the CPU. No code is run."""
    place = _place(folder / "checkpoints", step)
    return torch.load(place / STATE, map_location="cpu", weights_only=True)


def state_of(objective: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Everything that steps change: weights, buffers (saved with the model or not), optimizer."""
    weights = objective.state_dict()
    return {
        "weights": weights,
        "buffers": {n: buffer for n, buffer in objective.named_buffers() if n not in weights},
        "optimizer": optimizer.state_dict(),
    }


def restore(state: dict[str, Any], objective: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Take what `state_of` gave."""
    objective.load_state_dict(state["weights"])
    buffers = dict(objective.named_buffers())
    for name, value in state["buffers"].items():
        buffers[name].copy_(value)
    optimizer.load_state_dict(state["optimizer"])


def _place(folder: Path, step: int) -> Path:
    return folder / f"step-{step:010}"


def _copied(value: Any) -> Any:
    """The same structure with tensors copied to the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item) for item in value)
    return value


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _folder_to_disk(folder: Path) -> None:
    """Names of new files in `folder` outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def save_weights(weights: dict[str, Tensor], path: Path) -> None:
    """Write the state dict to `path`: the whole file or none of it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            torch.save({name: tensor.cpu() for name, tensor in weights.items()}, file)
            _to_disk(file)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def load_weights(path: Path) -> dict[str, Tensor]:
    """The state dict that `save_weights` wrote."""
    loaded: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return loaded


def weights_sha256(weights: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of all tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()
