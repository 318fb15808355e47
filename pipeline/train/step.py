"""One optimizer step over one global batch: forward, loss, backward, step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pipeline.data.batch import Batch, moved
from pipeline.errors import NonFiniteError
from pipeline.losses.objective import Objective
from pipeline.train import coupled, reduce
from pipeline.train.reduce import Gradients, Microbatch

Counts = tuple[Mapping[int, Tensor], int]
"""What each of this worker's micro-batches adds to the denominators [K], and how many there are."""

OPTIMIZER = -1
"""In the place of a micro-batch's number: random numbers that the optimizer draws."""


@dataclass(frozen=True)
class Losses:
    """The global batch's losses, exact over all workers and micro-batches.

    A term without any item (all ignored) is None and not part of the sum.
    """

    terms: tuple[float | None, ...]
    total: float | None
    gradient_norm: float
    is_last: bool = False
    """Whether some worker was told to stop: all know it after the same step."""
    is_saved: bool = False
    """Whether the state is to be saved after this step, as one worker asked."""
    following: Tensor | None = None
    """Denominators of the next step's global batch, if its counts were given."""
    fault: NonFiniteError | None = None
    """What was not finite, in a step that was left out for it."""


def train_step(
    objective: Objective,
    gradients: Gradients,
    optimizer: torch.optim.Optimizer,
    own: Sequence[Microbatch],
    num_microbatches: int,
    *,
    step: int,
    seed: int,
    clip_norm: float | None,
    device: torch.device,
    stop: bool = False,
    save: bool = False,
    may_skip: bool = False,
    denominators: Tensor | None = None,
    following: Counts | None = None,
) -> Losses:
    """Move the weights by the gradient of the global batch's mean loss, and return the loss.

    `own` are this worker's of the batch's `num_microbatches`; there may be none. `stop` says that
    this worker was told to stop, `save` that it is to save the state after this step. The losses
    travel with the gradients, and so do the counts of the `following` step, whose `denominators`
    are then known. Where the loss or gradient is not finite, raises NonFiniteError on every worker
    before any weight has moved; or, if it `may_skip` the step, leaves weights, optimizer and
    buffers as they were.
    """
    weights = [term.weight for term in objective.terms]
    if denominators is None:
        counts = {number: objective.denominators(batch) for number, batch in own}
        denominators = reduce.summed(counts, num_microbatches, len(weights))
    divisors: list[float] = denominators.tolist()
    both = zip(weights, divisors, strict=True)
    scales = torch.tensor([w / d if d > 0 else 0.0 for w, d in both], dtype=torch.float64)
    scales, counted = scales.to(device), [d > 0 for d in divisors]
    numerators: dict[int, Tensor] = {}

    def draw(number: int) -> None:
        seed_device(seed_for(seed, step, number), device)

    num_terms, width = len(weights), len(weights) + 2
    num_losses = num_microbatches * width

    def riders() -> Tensor:
        counts, num_following = following or ({}, 0)
        told = reduce.zeros(num_losses + num_following * num_terms, device)
        table = told[:num_losses].view(num_microbatches, width)
        for number, _ in own:
            table[number, :num_terms] = numerators[number]
        if own and (stop or save):
            table[own[0][0], num_terms:] = told.new_tensor([stop, save])
        for number, count in counts.items():
            told[num_losses + number * num_terms :][:num_terms] = count
        return told

    shares = coupled.shares(objective, own, num_microbatches, draw, device)

    def forward_backward(model: nn.Module, number: int, batch: Batch | None) -> None:
        draw(number)  # dropout follows the rows, not the worker
        rows = batch and moved(batch, device)
        losses, numerators[number] = model(rows, shares.get(number), counted)
        loss = (losses * scales.to(losses.dtype)).sum()
        if loss.requires_grad:  # else nothing counts in this step
            loss.backward()

    before = gradients.buffers.copy() if may_skip else []
    sums = gradients.reduce(own, num_microbatches, forward_backward, riders)
    norm = _clipped(gradients, clip_norm)
    table = sums[:num_losses].view(num_microbatches, -1)
    whole = table.sum(0)
    known = sums[num_losses:].view(-1, num_terms).sum(0) if following else None
    *sums_of_terms, num_stopping, num_saving = whole.tolist()
    result = replace(
        _losses(sums_of_terms, divisors, weights, norm),
        is_last=num_stopping > 0, is_saved=num_saving > 0, following=known,
    )  # fmt: skip
    if not math.isfinite(norm) or not math.isfinite(result.total or 0.0):
        labels = [term.label for term in objective.terms]
        named = {k: v for k, v in zip(labels, result.terms, strict=True) if v is not None}
        odd = (~torch.isfinite(table).all(1)).nonzero().flatten().tolist()
        fault = NonFiniteError(step + 1, norm, named, odd)
        if not may_skip:
            raise fault
        gradients.buffers.restore(before)
        return replace(result, fault=fault)
    draw(OPTIMIZER)
    optimizer.step()
    return result


def _clipped(gradients: Gradients, clip_norm: float | None) -> float:
    """Norm of the whole gradient, which is then scaled down to `clip_norm` if above it."""
    norm = gradients.norm()
    if clip_norm is not None:
        nn.utils.clip_grads_with_norm_(gradients.trained, clip_norm, norm)
    return float(norm)


def seed_device(seed: int, device: torch.device) -> None:
    """Seed what `device` draws from; `torch.manual_seed` tells all that there are, in 1 ms."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _losses(
    numerators: list[float], denominators: list[float], weights: list[float], norm: float
) -> Losses:
    both = zip(numerators, denominators, strict=True)
    terms = tuple(n / d if d > 0 else None for n, d in both)
    present = [w * t for w, t in zip(weights, terms, strict=True) if t is not None]
    return Losses(terms, sum(present) if present else None, norm)


def seed_for(seed: int, step: int, number: int = OPTIMIZER) -> int:
    """The seed of one micro-batch of a step, or of the optimizer (the finaliser of splitmix64)."""
    value = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + number + 1) % 2**64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % 2**64
    return (value ^ (value >> 31)) % 2**63
