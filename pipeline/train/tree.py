"""Sums in one fixed order, so that their bits do not depend on the number of workers.

The micro-batches of a global batch are the leaves of a binary tree that halves their range at its
midpoint. A worker owns one subtree, adds it up depth first, and the workers add their subtrees
together in the tree's order. Every addition has the same two operands whoever makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.data.order import middle, subtrees
from pipeline.errors import UsageError
from pipeline.train import reduce
from pipeline.train.reduce import ForwardBackward, Microbatch

# renamed in torch 2.13
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)

SMALL = 2**18
"""Numbers over all workers up to which gathering whole vectors is quicker."""


class Ordered:
    """Gradients and buffers, summed over micro-batches and workers in the tree's order.

    Gradients live in one flat tensor, behind them the changes that forward passes make to buffers,
    such as BatchNorm's running statistics: each micro-batch starts from the step's buffers, and
    the mean of its changes makes the next step's.
    """

    def __init__(self, objective: nn.Module) -> None:
        self.objective = objective
        trained = [p for p in objective.parameters() if p.requires_grad]
        self.buffers = reduce.Buffers(objective)
        kinds = {tensor.dtype for tensor in (*trained, *self.buffers.floats)}
        if len(kinds) > 1:
            names = ", ".join(sorted(map(str, kinds)))
            raise UsageError(
                f"training.microbatch_size: the model's parameters have several types ({names}); "
                "the fixed order of sums needs one"
            )
        self.num_gradients = sum(p.numel() for p in trained)
        size = self.num_gradients + self.buffers.size
        num_workers = reduce.num_workers()
        self.segment = -(-size // num_workers)  # every worker sends segments of the same length
        self.flat = trained[0].new_zeros(self.segment * num_workers)
        ends = accumulate(p.numel() for p in trained)
        self.views = [
            (parameter, self.flat[end - parameter.numel() : end].view_as(parameter))
            for parameter, end in zip(trained, ends, strict=True)
        ]

    def reduce(
        self, own: Sequence[Microbatch], num_microbatches: int, forward_backward: ForwardBackward
    ) -> None:
        """Leave in each parameter's `grad` the sum over the whole batch."""
        batches = dict(own)
        for parameter, view in self.views:  # an optimizer may have put None in its place
            parameter.grad = view
        before = self.buffers.copy()
        tail = self.flat[self.num_gradients : self.num_gradients + self.buffers.size]

        def leaf(number: int) -> Tensor:
            self.buffers.restore(before)
            self.flat.zero_()
            forward_backward(self.objective, number, batches[number])
            tail.copy_(self.buffers.changes(before))
            return self.flat

        if batches:
            total = depth_first(min(batches), max(batches) + 1, leaf)
            if total is not self.flat:
                self.flat.copy_(total)
        if reduce.num_workers() > 1:
            self._exchange(num_microbatches)
        self.buffers.change(before, tail / num_microbatches)

    def _exchange(self, num_microbatches: int) -> None:
        """All-to-all of equal segments, a local sum in the tree's order, all-gather.

        A small vector is gathered whole instead: one message less, the same additions.
        """
        num_workers = reduce.num_workers()
        is_small = self.flat.numel() * num_workers <= SMALL
        if is_small:
            received = self.flat.new_empty(num_workers * self.flat.numel())
            _all_gather(received, self.flat)
        else:
            received = torch.empty_like(self.flat)
            dist.all_to_all_single(received, self.flat)
        parts = received.view(num_workers, -1)
        owners: dict[tuple[int, int], Tensor] = dict(
            zip(subtrees(num_microbatches, num_workers), parts, strict=False)
        )

        def joined(start: int, end: int) -> Tensor:
            if (start, end) in owners:
                return owners[start, end]
            half = middle(start, end)
            return joined(start, half) + joined(half, end)

        if is_small:
            self.flat.copy_(joined(0, num_microbatches))
        else:
            _all_gather(self.flat, joined(0, num_microbatches).contiguous())


def depth_first(start: int, end: int, leaf: Callable[[int], Tensor]) -> Tensor:
    """Sum of `leaf(start)` to `leaf(end - 1)` in the tree's order.

    `leaf` may return the same tensor each time: what is needed longer is copied. At most as many
    copies are alive as the tree is deep.
    """
    if end - start == 1:
        return leaf(start)
    half = middle(start, end)
    left = depth_first(start, half, leaf)
    if half - start == 1:
        left = left.clone()
    left += depth_first(half, end, leaf)
    return left
