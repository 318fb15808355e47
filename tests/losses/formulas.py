"""A registered loss's mean over a few items, to compare with a formula."""

from __future__ import annotations

from typing import Any

import torch

from pipeline import registry
from pipeline.losses.contract import build


def mean(name: str, *columns: Any, **options: Any) -> float:
    """Numerator over denominator of a loss, for predictions and, last, targets, in float64."""
    tensors = [torch.as_tensor(column) for column in columns]
    tensors = [t.double() if t.is_floating_point() else t for t in tensors]
    loss = build(registry.losses[name], options)
    items = loss.items(*tensors)
    if loss.per_batch:
        return float(items)
    assert loss.denominator is not None
    targets = tensors[len(loss.roles) :]
    return float(items.sum() / loss.denominator(len(tensors[0]), *targets).sum())
