"""Low-rank adaptation of linear layers (Hu et al., 2021): W + alpha / rank * B A."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

ORIGINAL = ".parametrizations.weight.original"
"""After a layer's name in a state dict: its own weight."""
FACTORS = ".parametrizations.weight.0.lora_"
"""After a layer's name in a state dict: its factors, `a` and `b`."""


class LowRank(nn.Module):
    """Adds the product of two trained factors to a weight [out, in], which is 0 at the start."""

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        width_out, width_in = weight.shape
        self.scale = alpha / rank
        self.lora_a = nn.Parameter(weight.new_empty(rank, width_in))
        self.lora_b = nn.Parameter(weight.new_zeros(width_out, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight to compute with."""
        with torch.autocast(weight.device.type, enabled=False):  # as `merged` computes it
            return _sum(weight, self.lora_a, self.lora_b, self.scale)


def _sum(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return weight + scale * (b @ a)


def adapt(layer: nn.Linear, rank: int, alpha: float) -> None:
    """Train two factors in place of the layer's weight."""
    layer.weight.requires_grad_(False)
    parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank, alpha))


def merged(weights: Mapping[str, Tensor], rank: int, alpha: float) -> dict[str, Tensor]:
    """A state dict of adapted layers as one of plain layers that compute the same."""
    plain = {name: w for name, w in weights.items() if FACTORS not in name}
    for name in [name for name in plain if name.endswith(ORIGINAL)]:
        layer = name.removesuffix(ORIGINAL)
        if f"{layer}{FACTORS}a" in weights:
            a, b = (weights[f"{layer}{FACTORS}{factor}"] for factor in "ab")
            plain[f"{layer}.weight"] = _sum(plain.pop(name), a, b, alpha / rank)
    return plain
