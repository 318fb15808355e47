"""Gradients summed in one fixed order, so that their bits do not depend on the number of workers.

The micro-batches of a global batch are the leaves of a binary tree (see `pipeline.data.partition`).
A worker computes one subtree and adds it up depth first; the workers add their subtrees together in
the tree's order. Every addition has the same two operands whoever makes it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.data.batch import Batch
from pipeline.data.loader import StepBatch
from pipeline.data.partition import midpoint, subtrees
from pipeline.distributed import comm
from pipeline.distributed.buffers import Buffers
from pipeline.distributed.gradients import Gradients, append_reached, drop_unreached
from pipeline.distributed.seeds import Seeds
from pipeline.errors import UsageError
from pipeline.losses.objective import Objective

# renamed in torch 2.13
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)

SMALL = 2**18
"""Numbers over all workers up to which gathering whole vectors is quicker."""
ALIGNED = 8
"""Numbers, of any type, of which so many are whole float64s."""


def is_small(objective: Objective) -> bool:
    """Whether the gradient is one message, so that DDP could not overlap its sum with anything."""
    trained = [p for p in objective.parameters() if p.requires_grad]
    dtypes = _dtypes(trained, Buffers(objective, {}))
    return len(dtypes) == 1 and sum(map(_num_reals, trained)) <= SMALL


class OrderedGradients(Gradients):
    """Gradients and buffers, summed over micro-batches and workers in the tree's order.

    Gradients live in one flat tensor, followed by the changes that forward passes make to buffers,
    such as BatchNorm's running statistics (see `Buffers`).
    """

    def __init__(
        self, objective: Objective, seeds: Seeds, changing: Mapping[str, bool] | None = None
    ) -> None:
        super().__init__(objective, seeds, changing)
        dtypes = _dtypes(self.trained, self.buffers)
        if len(dtypes) > 1:
            raise UsageError(
                "training.microbatch_size: the model's weights and buffers have several types "
                f"({', '.join(sorted(map(str, dtypes)))}); the fixed order of sums needs one"
            )
        self.num_workers = comm.num_workers()
        self.num_gradients = sum(map(_num_reals, self.trained))
        self.size = self.num_gradients + self.buffers.size
        self._allocate(self.size)

    def _allocate(self, size: int) -> None:
        dtype = self.trained[0].dtype.to_real()
        self.views: list[tuple[nn.Parameter, Tensor]] = []
        self.flat = self.trained[0].new_empty(0, dtype=dtype)
        for parameter in self.trained:  # nothing holds the old memory while the new is allocated
            parameter.grad = None
        self.flat = self.flat.new_empty(size)
        self.flat[self.size :] = 0
        ends = accumulate(map(_num_reals, self.trained))
        self.views = [
            (parameter, _view_as(self.flat[end - _num_reals(parameter) : end], parameter))
            for parameter, end in zip(self.trained, ends, strict=True)
        ]

    def microbatches(self, batch: StepBatch) -> Iterator[tuple[int, Batch | None]]:
        """Add up this worker's subtree, in the order of its micro-batches."""
        self._begin(batch)
        self._allocate(self.flat.numel())  # an optimizer may keep the gradients of the step before
        for parameter, view in self.views:  # an optimizer may have put None in its place
            parameter.grad = view
        self._versions = [view._version for _, view in self.views]
        microbatches = dict(batch.microbatches)
        flat = self.flat[: self.size]
        if microbatches:
            total = yield from self._sum(microbatches, min(microbatches), max(microbatches) + 1)
            if total is not flat:
                flat.copy_(total)
        else:
            flat.zero_()

    def _sum(
        self, microbatches: dict[int, Batch], start: int, end: int
    ) -> Generator[tuple[int, Batch | None], None, Tensor]:
        """Sum of the micro-batches from `start` to before `end`: at most as many copies as levels.

        A leaf's gradient stands in the flat tensor until the next one: what is needed longer is
        copied.
        """
        if end - start == 1:
            flat = self.flat[: self.size]
            tail = self.flat[self.num_gradients : self.size]
            self.buffers.restore(self._buffers_before)
            flat.zero_()
            yield self._prepare(start, microbatches[start])
            if self.buffers:
                tail.copy_(self.buffers.changes(self._buffers_before))
            return flat
        half = midpoint(start, end)
        left = yield from self._sum(microbatches, start, half)
        if half - start == 1:
            left = left.clone()
        left += yield from self._sum(microbatches, half, end)
        return left

    def all_reduce(self, message: Tensor) -> Tensor:
        """Sum gradients, buffers' changes and the message over workers, in the tree's order."""
        both = zip(self.views, self._versions, strict=True)
        reached = [view._version != version for (_, view), version in both]
        message = append_reached(message, reached)
        if self.num_workers > 1:
            message = self._exchange(message)
        if self.buffers:
            changes = self.flat[self.num_gradients : self.size]
            self.buffers.apply_changes(
                self._buffers_before, changes, self._num_microbatches, self._has_rows
            )
        return drop_unreached(self.trained, message.cpu(), reached)

    def norm(self) -> Tensor:
        """Norm of the global gradient."""
        norm: Tensor = torch.linalg.vector_norm(self.flat[: self.num_gradients])
        return norm

    def _exchange(self, message: Tensor) -> Tensor:
        """Sum what is flat over workers, and the message, which is returned.

        All-to-all of equal segments, a local sum in the tree's order, all-gather. A small vector is
        gathered whole instead, followed by the message's bytes: one message, the same additions.
        """
        num_workers = self.num_workers
        start = -(-self.size // ALIGNED) * ALIGNED
        is_small = start * num_workers <= SMALL
        width = message.numel() * message.element_size() // self.flat.element_size()
        end = start + width if is_small else -(-start // num_workers) * num_workers
        if end > self.flat.numel():
            self._grow(end)
        flat = self.flat[:end]
        if is_small:
            flat[start:].view(message.dtype).copy_(message)
            received = flat.new_empty((end * num_workers,))
            _all_gather(received, flat)
        else:
            received = torch.empty_like(flat)
            dist.all_to_all_single(received, flat)
        parts = received.view(num_workers, -1)
        ranges = subtrees(self._num_microbatches, num_workers)
        sums: dict[tuple[int, int], Tensor] = dict(zip(ranges, parts[:, :start], strict=False))

        def joined(start: int, end: int) -> Tensor:
            if (start, end) in sums:
                return sums[start, end]
            half = midpoint(start, end)
            return joined(start, half) + joined(half, end)

        whole = joined(0, self._num_microbatches)
        if is_small:
            flat[:start].copy_(whole)
            return parts[:, start:].view(message.dtype).sum(0)
        _all_gather(flat, whole.contiguous())
        return comm.all_reduce(message)

    def _grow(self, size: int) -> None:
        """Allocate `size` numbers, and keep what the first of them are."""
        before = self.flat
        self._allocate(-(-size // ALIGNED) * ALIGNED)
        self.flat[: self.size] = before[: self.size]
        for parameter, view in self.views:
            parameter.grad = view


def _num_reals(parameter: Tensor) -> int:
    """Real numbers that its gradient takes: an even number, where a complex one can begin."""
    return 2 * parameter.numel() if parameter.is_complex() else -(-parameter.numel() // 2) * 2


def _dtypes(trained: list[nn.Parameter], buffers: Buffers) -> set[torch.dtype]:
    """Types of the real numbers that a step has to sum."""
    return {parameter.dtype.to_real() for parameter in trained} | buffers.dtypes


def _view_as(reals: Tensor, parameter: Tensor) -> Tensor:
    """The numbers [size] as a tensor whose memory is laid out as autograd lays out a gradient.

    That is as the parameter's own: fused optimizers walk both in the order of memory. It counts its
    own changes (`_version`), apart from those of the flat tensor: so it is known whether autograd
    has added to it.
    """
    if parameter.is_complex():
        reals = torch.view_as_complex(reals.view(-1, 2))
    return reals.as_strided(parameter.shape, torch.empty_like(parameter).stride()).data
