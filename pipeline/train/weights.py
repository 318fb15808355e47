"""Trained weights in one file, loaded without unpickling code, and their hash."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor

from pipeline.train.files import to_disk


def save_weights(weights: dict[str, Tensor], path: Path) -> None:
    """Write the state dict to `path`: the whole file or none of it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            torch.save({name: tensor.cpu() for name, tensor in weights.items()}, file)
            to_disk(file)
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
