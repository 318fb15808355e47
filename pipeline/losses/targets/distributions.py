"""Targets that are probabilities over classes."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.losses.targets.base import Target, unmeant

SUM_ATOL = 1e-3
"""How far probabilities of a row may sum to something else than 1."""


class Distribution(Target):
    """Probabilities over the prediction's classes: float32."""

    name = "distribution"

    def check_values(self, label: str, name: str, target: Tensor) -> None:
        sums = target.sum(1)
        is_one = torch.allclose(sums, torch.ones_like(sums), atol=SUM_ATOL)
        if float(target.min()) < 0 or not is_one:
            fix = "divide each row by its sum; leave target_scale at none"
            expected = "; each row must be probabilities that sum to 1"
            raise unmeant(label, name, target, expected, fix)


class LogDistribution(Target):
    """Logarithms of probabilities: float32."""

    name = "log_distribution"

    def check_values(self, label: str, name: str, target: Tensor) -> None:
        if float(target.max()) > 1e-6:
            fix = "set log_target to false, or take the logarithm of the target"
            expected = ", expected logarithms of probabilities (at most 0)"
            raise unmeant(label, name, target, expected, fix)
