"""Norms of each parameter and of its gradient: where training is too fast, too slow or dead."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.rundir.records import Numbers


@torch.no_grad()
def parameter_norms(module: nn.Module) -> Numbers:
    """`weight/NAME` and `gradient/NAME` of each trained parameter: its Euclidean norm.

    Gradients are those that the optimizer was given, so clipped ones where they are clipped.
    """
    names, norms = [], []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        for kind, tensor in (("weight", parameter), ("gradient", parameter.grad)):
            if tensor is not None:
                names.append(f"{kind}/{name}")
                norms.append(_norm(tensor))
    return dict(zip(names, torch.stack(norms).tolist(), strict=True)) if names else {}


def _norm(tensor: Tensor) -> Tensor:
    dense = tensor if tensor.layout == torch.strided else tensor.to_dense()
    norm: Tensor = torch.linalg.vector_norm(dense).double()
    return norm
