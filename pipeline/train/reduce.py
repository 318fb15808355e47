"""Sums over workers: gradients, denominators and losses. Never means of means."""

# no `from __future__ import annotations`: DDP compares the hook's annotation with the type itself
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.losses.objective import Objective


def num_workers() -> int:
    """Worker processes of this run; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this worker, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def total(values: Tensor) -> Tensor:
    """Sum of a float64 vector over all workers, the same on each."""
    if num_workers() > 1:
        values = values.to(_reduction_device()).clone()
        dist.all_reduce(values)
    return values.cpu()


def _reduction_device() -> torch.device:
    on_gpu = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


class _Reached(torch.autograd.Function):
    """Values as they are, with every parameter on the way of their gradient.

    DDP waits for each parameter's hook in each backward pass. A worker without rows, or an output
    that no loss reads, would leave some out; through this they report "no gradient" at no cost.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, *parameters: Tensor) -> Tensor:
        ctx.num_parameters = len(parameters)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return (gradients[0], *([None] * ctx.num_parameters))


class Shared(nn.Module):
    """The objective as DDP sees it: takes a batch, or None where a worker has no rows."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective
        self.trained = [p for p in objective.parameters() if p.requires_grad]

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Numerators [K] with their gradient, and in float64 for the record [K]."""
        if batch is None:
            num_terms, like = len(self.objective.terms), self.trained[0]
            numerators = torch.zeros(num_terms, dtype=like.dtype, device=like.device)
            recorded = torch.zeros(num_terms, dtype=torch.float64, device=like.device)
        else:
            numerators, recorded = self.objective(batch)
        reached: Tensor = _Reached.apply(numerators, *self.trained)  # type: ignore[no-untyped-call]
        return reached, recorded


def _summed(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """DDP communication hook: the sum over workers, where DDP's own would take the mean."""
    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])  # type: ignore[no-any-return]


def shared(objective: Objective, device: torch.device) -> nn.Module:
    """The objective, its gradients summed over workers after each backward pass."""
    alone = Shared(objective)
    if num_workers() == 1:
        return alone
    wrapped = DistributedDataParallel(
        alone, device_ids=[device.index] if device.type == "cuda" else None
    )
    wrapped.register_comm_hook(None, _summed)
    return wrapped
