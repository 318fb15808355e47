"""How the numbers of a module must stand in memory, for steps to change them."""

from __future__ import annotations

import torch
from torch import nn

from pipeline.errors import UsageError


def own_memory(objective: nn.Module) -> None:
    """Let each number of a buffer stand in memory once. Raises UsageError where a weight does not.

    Steps write into both. (`expand` makes tensors that repeat one number.)
    """
    for path, parameter in objective.named_parameters():
        if _repeats(parameter):
            raise UsageError(
                f"model: parameter {path!r} repeats numbers in memory, as `expand` makes them, and "
                "cannot be updated: append .clone()"
            )
    for path, buffer in list(objective.named_buffers()):
        if _repeats(buffer) or buffer.is_conj() or buffer.is_neg():
            module, _, own = path.rpartition(".")
            objective.get_submodule(module).register_buffer(
                own,
                buffer.resolve_conj().resolve_neg().contiguous(),
                persistent=path in objective.state_dict(),
            )


def dense_gradients(objective: nn.Module) -> None:
    """Embeddings whose gradients are summed as other tensors are; their numbers are the same."""
    for module in objective.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            module.sparse = False


def _repeats(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and any(
        size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
