"""One optimizer step over one global batch: forward, loss, backward, step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.data.batch import Batch, moved
from pipeline.errors import NonFiniteError
from pipeline.losses.objective import Objective
from pipeline.train import reduce

Microbatch = tuple[int, Batch]
"""Number of the micro-batch within the global batch, and its rows on the host."""


@dataclass(frozen=True)
class Losses:
    """The global batch's losses, exact over all workers and micro-batches.

    A term without any item (all ignored) is None and not part of the sum.
    """

    terms: tuple[float | None, ...]
    total: float | None
    gradient_norm: float


def train_step(
    shared: nn.Module,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    microbatches: Sequence[Microbatch],
    *,
    step: int,
    seed: int,
    clip_norm: float | None,
    device: torch.device,
) -> Losses:
    """Move the weights by the gradient of the global batch's mean loss, and return the loss.

    `microbatches` are this worker's part of the batch; it may be empty. Raises NonFiniteError on
    every worker, before any weight has moved.
    """
    weights = torch.tensor([term.weight for term in objective.terms], dtype=torch.float64)
    counts = [objective.denominators(batch) for _, batch in microbatches]
    denominators = reduce.total(sum(counts, start=torch.zeros_like(weights)))
    scales = torch.where(denominators > 0, weights / denominators, 0.0).to(device)

    numerators = torch.zeros_like(scales)
    own: Sequence[tuple[int, Batch | None]] = microbatches or [(0, None)]
    for number, batch in own:
        is_last = number == own[-1][0]
        torch.manual_seed(_mixed(seed, step, number))
        with _gradients_reduced(shared, is_last):
            losses, recorded = shared(batch and moved(batch, device))
            (losses * scales.to(losses.dtype)).sum().backward()
        numerators += recorded

    norm = _clipped(objective, clip_norm)
    result = _losses(objective, reduce.total(numerators), denominators, weights, norm)
    if not math.isfinite(norm) or not math.isfinite(result.total or 0.0):
        named = {
            t.label: v for t, v in zip(objective.terms, result.terms, strict=True) if v is not None
        }
        raise NonFiniteError(step + 1, norm, named)
    optimizer.step()
    optimizer.zero_grad()
    return result


def _gradients_reduced(shared: nn.Module, now: bool) -> AbstractContextManager[None]:
    """Backward passes inside sum their gradients over workers only if `now`."""
    if now or not isinstance(shared, DistributedDataParallel):
        return nullcontext()
    return shared.no_sync()


def _clipped(objective: nn.Module, clip_norm: float | None) -> float:
    """Norm of the whole gradient, which is then scaled down to `clip_norm` if above it.

    A parameter that nothing reached has gradient 0, on one worker as on many.
    """
    parameters = [p for p in objective.parameters() if p.requires_grad]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    limit = math.inf if clip_norm is None else clip_norm
    return float(nn.utils.clip_grad_norm_(parameters, limit))


def _losses(
    objective: Objective, numerators: Tensor, denominators: Tensor, weights: Tensor, norm: float
) -> Losses:
    terms = tuple(
        float(n / d) if d > 0 else None for n, d in zip(numerators, denominators, strict=True)
    )
    present = [w * t for w, t in zip(weights.tolist(), terms, strict=True) if t is not None]
    return Losses(terms, sum(present) if present else None, norm)


def _mixed(seed: int, step: int, number: int) -> int:
    """One seed from three numbers (the finaliser of splitmix64)."""
    value = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + number + 1) % 2**64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % 2**64
    return (value ^ (value >> 31)) % 2**63
