"""The weights that `model.init_from` names: out of a run, an MLflow model or a safetensors file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UsageError
from pipeline.launch.resume import storage_of
from pipeline.launch.trained import is_recorded, run_of
from pipeline.spec import JobSpec

if TYPE_CHECKING:
    from torch import Tensor

MODEL = "model."
"""Before the names of the model's weights in a run's `weights.pt`."""


def load_initial(spec: JobSpec, base: Path) -> tuple[JobSpec, dict[str, Tensor] | None]:
    """The spec with the hash of its model's initial weights, and these; None where it has none.

    Raises UsageError for a source that is none, or has another hash than the spec.
    """
    init_from = spec.model.init_from
    if init_from is None:
        return spec, None
    from pipeline.train.weights import weights_sha256

    key = f"model.init_from: {init_from.weights}"
    try:
        weights = _read(init_from.weights, spec, base)
    except UsageError as error:
        raise UsageError(f"{key} {error}") from error.__cause__
    found = weights_sha256(weights)
    if init_from.sha256 not in (None, found):
        raise UsageError(f"{key} has the SHA-256 {found}, not the one in model.init_from.sha256")
    filled = init_from.model_copy(update={"sha256": found})
    model = spec.model.model_copy(update={"init_from": filled})
    return spec.model_copy(update={"model": model}), weights


def _read(source: str, spec: JobSpec, base: Path) -> dict[str, Tensor]:
    from pipeline.train.weights import load_weights

    storage = storage_of(spec)
    if is_recorded(source):
        from pipeline.tracking.model import downloaded
        from pipeline.tracking.names import tracking_uri

        with downloaded(source, tracking_uri(storage)) as artifacts:
            return _of_model(load_weights(artifacts / "weights.pt"))
    places = [base / Path(source).expanduser(), storage / source]
    path = next((place for place in places if place.exists()), None)
    if path is None:
        raise UsageError(f"is not there; looked for {' and '.join(map(str, places))}")
    if path.is_dir():
        return _of_model(load_weights(run_of(path).weights))
    if path.suffix != ".safetensors":
        raise UsageError("is neither the folder of a run nor a .safetensors file")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"cannot be read: {error}") from error


def _of_model(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A run's weights without those that its losses own, named as the model names them."""
    return {name.removeprefix(MODEL): w for name, w in weights.items() if name.startswith(MODEL)}
