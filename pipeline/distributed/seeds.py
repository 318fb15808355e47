"""Random numbers of a step: they follow the micro-batch, not the worker that computes it."""

from __future__ import annotations

import torch

OPTIMIZER = -1
"""Stands for a micro-batch's index where the optimizer draws."""


def seed_for(seed: int, step: int, index: int = OPTIMIZER) -> int:
    """The seed of one micro-batch of a step, or of the optimizer (the finaliser of splitmix64)."""
    value = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + index + 1) % 2**64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % 2**64
    return (value ^ (value >> 31)) % 2**63


class Seeds:
    """Seeds what one device draws from, as a run's seed says."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed, self.device = seed, device

    def set(self, step: int, index: int = OPTIMIZER) -> None:
        """Before a micro-batch of a step, or before the optimizer's."""
        value = seed_for(self.seed, step, index)
        torch.default_generator.manual_seed(value)  # torch.manual_seed asks for all GPUs, in 1 ms
        if self.device.type == "cuda":
            torch.cuda.manual_seed(value)
