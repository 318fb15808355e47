"""Losses of the whole global batch, exact under any split, in two passes.

First every micro-batch goes through the model without a graph, and the predictions that such losses
read are gathered from all workers. Each worker then computes the loss of the whole batch, and its
gradient with respect to the predictions. In the second pass, the ordinary one, every micro-batch's
backward starts from its rows of that gradient. Both passes draw the same random numbers.
(As in Gao et al., "Scaling deep contrastive learning batch size under memory limited setup", 2021.)
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from pipeline.data.batch import to_device
from pipeline.data.loader import StepBatch
from pipeline.distributed import comm
from pipeline.distributed.gradients import Gradients
from pipeline.errors import ContractError
from pipeline.losses.objective import Objective, Share
from pipeline.losses.terms import Term


def shares(
    objective: Objective, gradients: Gradients, batch: StepBatch
) -> dict[int, dict[int, Share]]:
    """The share of each of this worker's micro-batches in each term that couples rows.

    Empty where no term does.
    """
    if not objective.is_coupled:
        return {}
    seeds = gradients.seeds
    coupled = {k: term for k, term in enumerate(objective.terms) if term.loss.per_batch}
    before = gradients.buffers.copy()
    arguments: dict[int, dict[int, list[Tensor]]] = {k: {} for k in coupled}
    for index, rows in batch.microbatches:
        seeds.set(batch.step, index)
        rows = to_device(rows, seeds.device)
        with torch.no_grad():
            predictions = objective.predict(rows)
            for k, term in coupled.items():
                arguments[k][index] = _tensors(term, term.arguments(predictions, rows))
        gradients.buffers.restore(before)
    by_microbatch: dict[int, dict[int, Share]] = {index: {} for index, _ in batch.microbatches}
    for k, term in coupled.items():
        try:
            parts = comm.gather_parts(arguments[k], batch.num_microbatches, seeds.device)
        except ValueError as error:
            raise _unsuitable(term, str(error)) from None
        seeds.set(batch.step, batch.num_microbatches + k)  # the same on every worker
        for index, share in enumerate(_shares_of(objective, k, parts)):
            if index in by_microbatch:
                by_microbatch[index][k] = share
    return by_microbatch


def _shares_of(objective: Objective, k: int, parts: list[list[Tensor]]) -> list[Share]:
    """The share of each micro-batch in term `k`, from the parts of each of its arguments."""
    term = objective.terms[k]
    own_parameters = objective.owned(k)
    sizes = [len(part) for part in parts[0]]
    whole = [torch.cat(pieces) for pieces in parts]
    num_predictions = len(term.outputs)
    leaves = [tensor.requires_grad_() for tensor in whole[:num_predictions]]
    loss = objective.computed(k, [*leaves, *whole[num_predictions:]])
    if loss.dim() != 0:
        raise _unsuitable(term, f"gives shape {list(loss.shape)} for the whole batch")
    wanted = [*leaves, *own_parameters]
    made: Sequence[Tensor | None] = [None] * len(wanted)
    if loss.requires_grad:  # else nothing of this batch counts, and the gradient is 0
        made = torch.autograd.grad(loss * len(whole[0]), wanted, allow_unused=True)
    gradients = [
        torch.zeros_like(one) if gradient is None else gradient
        for one, gradient in zip(wanted, made, strict=True)
    ]
    pieces = [torch.split(gradient, sizes) for gradient in gradients[:num_predictions]]
    carrier = next(i for i, end in enumerate(accumulate(sizes)) if end)  # the first with rows
    return [
        Share(
            float(loss.detach()),
            tuple(piece[index] for piece in pieces),
            tuple(gradients[num_predictions:]) if index == carrier else (),
        )
        for index in range(len(sizes))
    ]


def _tensors(term: Term, arguments: list[object]) -> list[Tensor]:
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    if len(tensors) < len(arguments):
        raise _unsuitable(term, "reads lists of different lengths")
    return tensors


def _unsuitable(term: Term, problem: str) -> ContractError:
    fix = "a loss of the whole batch takes rows of one shape, and gives one number"
    return ContractError(term.label, problem, fix)
