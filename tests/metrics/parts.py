"""A metric's value from any cut of its items into parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pipeline import registry
from pipeline.metrics import Metric

CUTS: tuple[list[int], ...] = ([], [7], [1, 2, 30])


def value_of(name: str, prediction: Any, truth: Any, weight: Any, cuts: list[int]) -> float:
    """The metric over all items, whose sums are taken part by part."""
    metric: Metric = registry.metrics[name].build()
    items = [torch.from_numpy(np.asarray(values)) for values in (prediction, truth, weight)]
    if metric.sums is None:
        return metric.value(*items)
    sums = metric.sums
    parts = zip(*(torch.tensor_split(tensor, cuts) for tensor in items), strict=True)
    return metric.value(torch.stack([sums(*part) for part in parts]).sum(0))
