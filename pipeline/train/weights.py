"""Trained weights in one file, loaded without unpickling code, and their hash."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pipeline.train.files import replacing


def save_weights(
    weights: dict[str, Tensor], path: Path, may_write: Callable[[], None] = lambda: None
) -> None:
    """Write the state dict to `path`: the whole file or none of it."""
    with replacing(path, may_write) as file:
        torch.save({name: tensor.cpu() for name, tensor in weights.items()}, file)


def load_weights(path: Path) -> dict[str, Tensor]:
    """The state dict that `save_weights` wrote."""
    loaded: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return loaded


def weights_sha256(weights: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of all tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        here = tensor.detach().cpu()
        dense = here if here.layout == torch.strided else here.to_dense()
        flat = dense.contiguous().reshape(-1)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()
