"""Trained weights in one file, loaded without unpickling code, and their hash."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn


def save_weights(weights: Mapping[str, Tensor], file: BinaryIO) -> None:
    """Write a state dict to an open file."""
    torch.save({name: tensor.cpu() for name, tensor in weights.items()}, file)


def load_weights(path: Path) -> dict[str, Tensor]:
    """The state dict that `save_weights` wrote."""
    loaded: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return loaded


def take_weights(
    module: nn.Module, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor] | None = None
) -> None:
    """Load a state dict into a new module, and `buffers` that are not part of one.

    A buffer that a forward pass has made, or made larger, is put in its place first.
    """
    device = next(module.parameters()).device
    for kept, is_persistent in ((weights, True), (buffers or {}, False)):
        for name, value in kept.items():
            path, _, own = name.rpartition(".")
            try:
                home = module.get_submodule(path)
            except AttributeError:  # a key that a module reads itself
                continue
            made = home._buffers.get(own)
            if made is not None and made.shape == value.shape and made.layout == torch.strided:
                made.detach().copy_(value)
            elif own in home._buffers or (not hasattr(home, own) and not _reads_itself(home)):
                home.register_buffer(own, value.to(device, copy=True), persistent=is_persistent)
    module.load_state_dict(weights)


def _reads_itself(module: nn.Module) -> bool:
    """Whether keys of a state dict may be other names than those of its tensors."""
    kind = type(module)
    return bool(
        kind._load_from_state_dict is not nn.Module._load_from_state_dict
        or kind.set_extra_state is not nn.Module.set_extra_state
        or module._load_state_dict_pre_hooks
    )


def to_cpu(value: Any) -> Any:
    """The same structure with its tensors copied to the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: to_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_cpu(item) for item in value)
    return value


def weights_sha256(weights: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of all tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(octets(tensor))
    return digest.hexdigest()


def octets(tensor: Tensor) -> memoryview | bytes:
    """The bytes of a tensor's numbers, in the order of their places."""
    here = tensor.detach().cpu()
    dense = here if here.layout == torch.strided else here.to_dense()
    flat = dense.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""
