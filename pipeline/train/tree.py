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
from pipeline.losses.objective import Objective
from pipeline.train import reduce
from pipeline.train.buffers import Buffers
from pipeline.train.reduce import ForwardBackward, Microbatch

# renamed in torch 2.13
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)

SMALL = 2**18
"""Numbers over all workers up to which gathering whole vectors is quicker."""
ALIGNED = 8
"""Numbers, of any type, of which so many are whole float64s."""


def is_small(objective: Objective) -> bool:
    """Whether the gradient is one message, so that DDP could not overlap its sum with anything."""
    trained = [p for p in objective.parameters() if p.requires_grad]
    kinds = reduce.kinds(trained, Buffers(objective))
    return len(kinds) == 1 and sum(map(reduce.room, trained)) <= SMALL


class Ordered:
    """Gradients and buffers, summed over micro-batches and workers in the tree's order.

    Gradients live in one flat tensor, behind them the changes that forward passes make to buffers,
    such as BatchNorm's running statistics (see `Buffers`).
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.trained = [p for p in objective.parameters() if p.requires_grad]
        self.buffers = Buffers(objective)
        kinds = reduce.kinds(self.trained, self.buffers)
        if len(kinds) > 1:
            names = ", ".join(sorted(map(str, kinds)))
            raise UsageError(
                f"training.microbatch_size: the model's weights and buffers have several types "
                f"({names}); "
                "the fixed order of sums needs one"
            )
        self.num_workers = reduce.num_workers()
        self.num_gradients = sum(map(reduce.room, self.trained))
        self.size = self.num_gradients + self.buffers.size
        self._make_room(self.size)

    def _make_room(self, size: int) -> None:
        kind = self.trained[0].dtype.to_real()
        self.views: list[tuple[nn.Parameter, Tensor]] = []
        self.flat = self.trained[0].new_empty(0, dtype=kind)
        for parameter in self.trained:  # nothing holds the old room while the new one is made
            parameter.grad = None
        self.flat = self.flat.new_empty(size)
        self.flat[self.size :] = 0
        ends = accumulate(map(reduce.room, self.trained))
        self.views = [
            (parameter, _laid_out(self.flat[end - reduce.room(parameter) : end], parameter))
            for parameter, end in zip(self.trained, ends, strict=True)
        ]

    def reduce(
        self, own: Sequence[Microbatch], num_microbatches: int, forward_backward: ForwardBackward,
        riders: Callable[[], Tensor],
    ) -> Tensor:  # fmt: skip
        """Leave in each parameter's `grad` the sum over the whole batch; returns that of riders."""
        batches = dict(own)
        self._make_room(self.flat.numel())  # an optimizer may keep the gradients of the step before
        for parameter, view in self.views:  # an optimizer may have put None in its place
            parameter.grad = view
        versions = [view._version for _, view in self.views]
        before = self.buffers.copy()
        flat, tail = self.flat[: self.size], self.flat[self.num_gradients : self.size]

        def leaf(number: int) -> Tensor:
            self.buffers.restore(before)
            flat.zero_()
            forward_backward(self.objective, number, batches[number])
            if self.buffers:
                tail.copy_(self.buffers.changes(before))
            return flat

        if batches:
            total = depth_first(min(batches), max(batches) + 1, leaf)
            if total is not flat:
                flat.copy_(total)
        else:
            flat.zero_()
        both = zip(self.views, versions, strict=True)
        reached = [view._version != version for (_, view), version in both]
        told = reduce.with_reached(riders(), reached)
        if self.num_workers > 1:
            told = self._exchange(num_microbatches, told)
        if self.buffers:
            sums = self.flat[self.num_gradients : self.size]
            self.buffers.change(before, sums, num_microbatches, bool(batches))
        return reduce.keep_reached(self.trained, told.cpu(), reached)

    def norm(self) -> Tensor:
        """Norm of the whole gradient."""
        norm: Tensor = torch.linalg.vector_norm(self.flat[: self.num_gradients])
        return norm

    def _exchange(self, num_microbatches: int, riders: Tensor) -> Tensor:
        """Sum what is flat over workers, and the riders, which are returned.

        All-to-all of equal segments, a local sum in the tree's order, all-gather. A small vector is
        gathered whole instead, with the riders' bytes behind it: one message, the same additions.
        """
        num_workers = self.num_workers
        start = -(-self.size // ALIGNED) * ALIGNED
        is_small = start * num_workers <= SMALL
        width = riders.numel() * riders.element_size() // self.flat.element_size()
        end = start + width if is_small else -(-start // num_workers) * num_workers
        if end > self.flat.numel():
            self._grow(end)
        flat = self.flat[:end]
        if is_small:
            flat[start:].view(riders.dtype).copy_(riders)
            received = flat.new_empty((end * num_workers,))
            _all_gather(received, flat)
        else:
            received = torch.empty_like(flat)
            dist.all_to_all_single(received, flat)
        parts = received.view(num_workers, -1)
        owners: dict[tuple[int, int], Tensor] = dict(
            zip(subtrees(num_microbatches, num_workers), parts[:, :start], strict=False)
        )

        def joined(start: int, end: int) -> Tensor:
            if (start, end) in owners:
                return owners[start, end]
            half = middle(start, end)
            return joined(start, half) + joined(half, end)

        whole = joined(0, num_microbatches)
        if is_small:
            flat[:start].copy_(whole)
            return parts[:, start:].view(riders.dtype).sum(0)
        _all_gather(flat, whole.contiguous())
        return reduce.total(riders)

    def _grow(self, size: int) -> None:
        """Make room for messages of `size` numbers."""
        before = self.flat
        self._make_room(-(-size // ALIGNED) * ALIGNED)
        self.flat[: self.size] = before[: self.size]
        for parameter, view in self.views:
            parameter.grad = view


def _laid_out(room: Tensor, parameter: Tensor) -> Tensor:
    """The room [size] as a tensor whose memory is laid out as autograd would lay out a gradient.

    That is as the parameter's own: fused optimizers walk both in the order of memory. It counts its
    own changes (`_version`), apart from those of the room: so it is known whether autograd has
    added to it.
    """
    if parameter.is_complex():
        room = torch.view_as_complex(room.view(-1, 2))
    return room.as_strided(parameter.shape, torch.empty_like(parameter).stride()).data


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
