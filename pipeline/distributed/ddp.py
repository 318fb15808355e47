"""Gradients summed by DDP while the backward pass still runs; in DDP's order."""

# no `from __future__ import annotations`: DDP compares the hook's annotation with the type itself
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.data.batch import Batch
from pipeline.data.loader import StepBatch
from pipeline.distributed import comm
from pipeline.distributed.gradients import Gradients, append_reached, drop_unreached
from pipeline.distributed.seeds import Seeds
from pipeline.losses.objective import Objective, Shares

# buffers are summed here, not sent by the first worker; the option was renamed in torch 2.13
_RENAMED = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
_OPTIONS: Any = {
    "forward_sync_buffers" if _RENAMED else "broadcast_buffers": False,
    "init_sync": False,  # all start from one seed, which is checked; and gloo lacks some types
}


class OverlappedGradients(Gradients):
    """Gradients summed by DDP; only the last backward pass of each worker waits for the others."""

    def __init__(
        self, objective: Objective, seeds: Seeds, changing: Mapping[str, bool] | None = None
    ) -> None:
        super().__init__(objective, seeds, changing)
        self._reached: set[Tensor] = set()  # by identity
        for parameter in self.trained:  # DDP will give all of them a gradient
            parameter.register_post_accumulate_grad_hook(self._note)  # type: ignore[no-untyped-call]
        if comm.num_workers() > 1:
            ids = [seeds.device.index] if seeds.device.type == "cuda" else None
            wrapped = DistributedDataParallel(
                _ObjectiveOrZeros(objective), device_ids=ids, **_OPTIONS
            )
            wrapped.register_comm_hook(None, _sum_bucket)
            self.model = wrapped

    def microbatches(self, batch: StepBatch) -> Iterator[tuple[int, Batch | None]]:
        """This worker's micro-batches, or one without rows."""
        self._begin(batch)
        self._reached.clear()
        for parameter in self.trained:
            parameter.grad = None
        for index, rows in batch.microbatches[:-1]:
            with self._no_sync():
                yield self._prepare(index, rows)
        index, last = batch.microbatches[-1] if batch.microbatches else (0, None)
        yield self._prepare(index, last)

    def all_reduce(self, message: Tensor) -> Tensor:
        """Sum buffers' changes and the message; the gradients are summed already."""
        if comm.num_workers() > 1 and self.buffers:
            self._sum_buffers()
        reached = [parameter in self._reached for parameter in self.trained]
        message = comm.all_reduce(append_reached(message, reached))
        return drop_unreached(self.trained, message, reached)

    def norm(self) -> Tensor:
        """Norm of the global gradient."""
        return nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None])

    def _note(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._reached.add(parameter)

    def _sum_buffers(self) -> None:
        """Change buffers by the workers' sum, or by the mean over those that had rows."""
        own = self.buffers.changes(self._buffers_before).double() * self._has_rows
        sums = comm.all_reduce(torch.cat([own.cpu(), own.new_tensor([self._has_rows]).cpu()]))
        changes = sums[:-1].to(own.device)
        self.buffers.apply_changes(self._buffers_before, changes, float(sums[-1]), self._has_rows)

    def _no_sync(self) -> AbstractContextManager[None]:
        """Backward passes inside only add to this worker's own gradients."""
        return (
            self.model.no_sync()
            if isinstance(self.model, DistributedDataParallel)
            else nullcontext()
        )


class _ObjectiveOrZeros(nn.Module):
    """The objective as DDP sees it: losses of 0 where a worker has no rows."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective
        self.trained = [p for p in objective.parameters() if p.requires_grad]

    def forward(
        self, rows: Batch | None, shares: Shares | None, has_items: Sequence[bool]
    ) -> tuple[Tensor, Tensor]:
        """Numerators [K] with their gradient, and in float64 for the record [K]."""
        if rows is None:
            num_terms = len(self.objective.terms)
            first = self.trained[0]
            numerators = torch.zeros(num_terms, dtype=first.dtype.to_real(), device=first.device)
            recorded = torch.zeros(num_terms, dtype=torch.float64, device=first.device)
        else:
            numerators, recorded = self.objective(rows, shares, has_items)
        touched: Tensor = _TouchParameters.apply(numerators, *self.trained)  # type: ignore[no-untyped-call]
        return touched, recorded


class _TouchParameters(torch.autograd.Function):
    """The values, with every parameter as one more input of the autograd graph.

    DDP waits for each parameter's hook in each backward pass. A worker without rows, or an output
    that no loss reads, would leave some out; through this, all of them run, at no cost, with a
    gradient of None where nothing depends on the parameter.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, *parameters: Tensor) -> Tensor:
        ctx.num_parameters = len(parameters)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return (gradients[0], *([None] * ctx.num_parameters))


def _sum_bucket(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """DDP communication hook: the sum over workers, where DDP's own would take the mean."""
    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])  # type: ignore[no-any-return]
