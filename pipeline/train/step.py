"""One optimizer step over one global batch: forward, loss, backward, step.

Losses are sums over the items of the global batch, divided by how many there are in it: what to
divide by is known before the forward pass. The losses travel with the gradients in one message, and
so do the counts of the next batch, whose denominators are then known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.data.loader import StepBatch
from pipeline.distributed import comm
from pipeline.distributed.gradients import Gradients
from pipeline.errors import NonFiniteError
from pipeline.losses.objective import Objective
from pipeline.telemetry.stopwatch import Phase
from pipeline.train import gradcache


class Requests(NamedTuple):
    """What a worker asks of all workers, which know it after the same step."""

    stop: bool = False
    """End the run after this step."""
    save: bool = False
    """Save the state after this step."""


NO_REQUESTS = Requests()


@dataclass(frozen=True)
class StepLosses:
    """The global batch's losses, exact over all workers and micro-batches.

    A term without any item (all ignored) is None and not part of the sum.
    """

    terms: tuple[float | None, ...]
    total: float | None
    gradient_norm: float
    requests: Requests = NO_REQUESTS
    """What any of the workers asked for."""
    nonfinite: NonFiniteError | None = None
    """What was not finite, if the step was skipped for it."""


def train_step(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    gradients: Gradients,
    batch: StepBatch,
    *,
    clip_norm: float | None = None,
    requests: Requests = NO_REQUESTS,
    skip_nonfinite: bool = False,
    lap: Callable[[Phase], None] = lambda phase: None,
) -> StepLosses:
    """Move the weights by the gradient of the global batch's mean loss, and return the loss.

    A loss or gradient that is not finite raises NonFiniteError on every worker; with
    `skip_nonfinite` the step changes nothing instead. `lap` is told when a phase has ended.
    """
    denominators = _exchange_denominators(objective, batch)
    scales = objective.scales(denominators).to(gradients.seeds.device)  # weight / denominator
    has_items = (denominators > 0).tolist()
    shares = gradcache.shares(objective, gradients, batch)  # of losses that need all rows at once
    message = Message(batch, len(has_items), gradients.seeds.device, requests)
    for index, rows in gradients.microbatches(batch):  # from zero, each with its own seed
        numerators, message.losses[index] = gradients.model(rows, shares.get(index), has_items)
        loss = (numerators * scales.to(numerators.dtype)).sum()
        if loss.requires_grad:  # else nothing counts in this step
            loss.backward()
    lap("forward_backward")
    message.take(gradients.all_reduce(message.vector))  # the gradients, and these beside them
    lap("exchange")
    norm = gradients.clip(clip_norm)
    losses = _losses(objective, message, denominators, norm)
    if error := _check_finite(objective, batch, message, losses):
        if not skip_nonfinite:
            raise error
        gradients.restore_buffers()
        return replace(losses, nonfinite=error)
    gradients.seeds.set(batch.step)  # for optimizers that draw random numbers
    optimizer.step()
    lap("optimizer")
    return losses


class Message:
    """Numbers that are summed over workers together with the gradients, in `vector`: float64.

    A row for each of the batch's micro-batches, with its losses and its worker's requests;
    then a row for each of the next batch's, with what its losses count. Each row is given by the
    worker that computes the micro-batch, and 0 on all others.
    """

    def __init__(
        self, batch: StepBatch, num_terms: int, device: torch.device, requests: Requests
    ) -> None:
        self._batch = batch
        self._num_terms = num_terms
        self._width = num_terms + len(requests)
        self._num_losses = batch.num_microbatches * self._width
        num_next = batch.next.num_microbatches if batch.next else 0
        self.vector = comm.zeros(self._num_losses + num_next * num_terms, device)
        if batch.microbatches and any(requests):
            first, _ = batch.microbatches[0]
            self.table[first, num_terms:] = self.vector.new_tensor(requests)
        for index, count in batch.next.counts.items() if batch.next else ():
            self.next_counts[index] = count

    def take(self, sums: Tensor) -> None:
        """The vector summed over workers: the next batch's denominators are known."""
        self.vector = sums
        if self._batch.next:
            self._batch.next.denominators = self.next_counts.sum(0)

    @property
    def table(self) -> Tensor:
        """Losses and requests [M, K + 2], of M micro-batches and K terms."""
        return self.vector[: self._num_losses].view(-1, self._width)

    @property
    def losses(self) -> Tensor:
        """The sum of each term's loss over each micro-batch's items: numerators [M, K]."""
        return self.table[:, : self._num_terms]

    @property
    def next_counts(self) -> Tensor:
        """What each micro-batch of the next batch adds to its denominators [M', K]."""
        return self.vector[self._num_losses :].view(-1, self._num_terms)


def _exchange_denominators(objective: Objective, batch: StepBatch) -> Tensor:
    """What each term is divided by: float64 [K], of the global batch.

    They came with the step before; in the first one all workers exchange them here.
    """
    if batch.denominators is None:
        num_terms = len(objective.terms)
        batch.denominators = comm.sum_by_index(batch.counts, batch.num_microbatches, num_terms)
    return batch.denominators


def _losses(
    objective: Objective, message: Message, denominators: Tensor, norm: float
) -> StepLosses:
    """The sums of all workers as losses."""
    *numerators, num_stopping, num_saving = message.table.sum(0).tolist()
    terms = tuple(
        numerator / denominator if denominator > 0 else None
        for numerator, denominator in zip(numerators, denominators.tolist(), strict=True)
    )
    weights = [term.weight for term in objective.terms]
    weighted = [w * t for w, t in zip(weights, terms, strict=True) if t is not None]
    requests = Requests(num_stopping > 0, num_saving > 0)
    return StepLosses(terms, sum(weighted) if weighted else None, norm, requests)


def _check_finite(
    objective: Objective, batch: StepBatch, message: Message, losses: StepLosses
) -> NonFiniteError | None:
    """The error of a step whose losses or gradient are not finite, with its micro-batches."""
    if math.isfinite(losses.gradient_norm) and math.isfinite(losses.total or 0.0):
        return None
    labels = [term.label for term in objective.terms]
    terms = {k: v for k, v in zip(labels, losses.terms, strict=True) if v is not None}
    indices = (~torch.isfinite(message.table).all(1)).nonzero().flatten().tolist()
    return NonFiniteError(batch.step + 1, losses.gradient_norm, terms, indices)
