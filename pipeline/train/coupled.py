"""Losses of the whole global batch, exact under any split, in two passes.

First every micro-batch goes through the model without a graph, and the predictions that such losses
read are gathered from all workers. Each worker then computes the loss of the whole batch, and its
gradient with respect to the predictions. In the second pass, the ordinary one, every micro-batch's
backward starts from its rows of that gradient. Both passes draw the same random numbers.
(As in Gao et al., "Scaling deep contrastive learning batch size under memory limited setup", 2021.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from pipeline.data.batch import moved
from pipeline.errors import ContractError
from pipeline.losses.objective import Objective, Share
from pipeline.losses.terms import Term
from pipeline.train import reduce
from pipeline.train.buffers import Buffers
from pipeline.train.reduce import Microbatch


def shares(
    objective: Objective,
    own: Sequence[Microbatch],
    num_microbatches: int,
    draw: Callable[[int], None],
    device: torch.device,
) -> dict[int, dict[int, Share]]:
    """For each of this worker's micro-batches, its share in each term that couples rows.

    `draw` sets the random numbers of a micro-batch. Empty where no term couples rows.
    """
    if not objective.is_coupled:
        return {}
    coupled = {k: term for k, term in enumerate(objective.terms) if term.loss.per_batch}
    buffers = Buffers(objective)
    before = buffers.copy()
    inputs: dict[int, dict[int, list[Tensor]]] = {k: {} for k in coupled}
    for number, batch in own:
        draw(number)
        batch = moved(batch, device)
        with torch.no_grad():
            predictions = objective.predict(batch)
            for k, term in coupled.items():
                inputs[k][number] = _tensors(term, term.arguments(predictions, batch))
        buffers.restore(before)
    found: dict[int, dict[int, Share]] = {number: {} for number, _ in own}
    for k, term in coupled.items():
        try:
            parts = reduce.gathered(inputs[k], num_microbatches, device)
        except ValueError as error:
            raise _unsuitable(term, str(error)) from None
        draw(num_microbatches + k)  # the same on every worker
        for number, share in _shares_of(objective, k, parts).items():
            if number in found:
                found[number][k] = share
    return found


def _shares_of(objective: Objective, k: int, parts: list[list[Tensor]]) -> dict[int, Share]:
    """The shares of all micro-batches in term `k`, from each of its inputs' parts."""
    term, own = objective.terms[k], objective.owned(k)
    sizes = [len(part) for part in parts[0]]
    whole = [torch.cat(pieces) for pieces in parts]
    num_predictions = len(term.outputs)
    leaves = [tensor.requires_grad_() for tensor in whole[:num_predictions]]
    loss = objective.computed(k, [*leaves, *whole[num_predictions:]])
    if loss.dim() != 0:
        raise _unsuitable(term, f"gives shape {list(loss.shape)} for the whole batch")
    wanted = [*leaves, *own]
    made: Sequence[Tensor | None] = [None] * len(wanted)
    if loss.requires_grad:  # else nothing of this batch counts, and the gradient is 0
        made = torch.autograd.grad(loss * len(whole[0]), wanted, allow_unused=True)
    gradients = [
        torch.zeros_like(one) if gradient is None else gradient
        for one, gradient in zip(wanted, made, strict=True)
    ]
    pieces = [torch.split(gradient, sizes) for gradient in gradients[:num_predictions]]
    ends = list(accumulate(sizes))
    carrier = next(number for number, end in enumerate(ends) if end)  # the first with rows
    return {
        number: Share(
            float(loss.detach()),
            tuple(piece[number] for piece in pieces),
            tuple(gradients[num_predictions:]) if number == carrier else (),
        )
        for number in range(len(sizes))
    }


def _tensors(term: Term, arguments: list[object]) -> list[Tensor]:
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    if len(tensors) < len(arguments):
        raise _unsuitable(term, "reads lists of different lengths")
    return tensors


def _unsuitable(term: Term, problem: str) -> ContractError:
    fix = "a loss of the whole batch takes rows of one shape, and gives one number"
    return ContractError(term.label, problem, fix)
