"""Sums over workers: gradients, denominators and losses. Never means of means."""

# no `from __future__ import annotations`: DDP compares the hook's annotation with the type itself
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.data.batch import Batch
from pipeline.losses.objective import Objective, Shares
from pipeline.train.buffers import Buffers

Microbatch = tuple[int, Batch]
"""Number of the micro-batch within the global batch, and its rows on the host."""
ForwardBackward = Callable[[nn.Module, int, Batch | None], None]
"""Forward, loss and backward of one numbered micro-batch through the given module."""


def num_workers() -> int:
    """Worker processes of this run; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this worker, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


ECHOES = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "NCCL")
"""What torch.distributed says in a worker whose neighbour is gone."""


def is_echo(error: object) -> bool:
    """A worker that only failed because another did: its connection was closed."""
    return isinstance(error, RuntimeError) and any(text in str(error) for text in ECHOES)


def total(values: Tensor) -> Tensor:
    """Sum of a float64 vector over all workers, the same on each."""
    if num_workers() > 1:
        values = values.to(meeting_device()).clone()
        dist.all_reduce(values)
    return values.cpu()


def summed(parts: Mapping[int, Tensor], num_parts: int, size: int) -> Tensor:
    """Sum of numbered vectors [size] of all workers, in float64 and in the order of the numbers.

    The order is what makes the bits the same however the parts are spread over workers.
    """
    return tabled(parts, num_parts, size).sum(0)


def tabled(parts: Mapping[int, Tensor], num_parts: int, size: int) -> Tensor:
    """Numbered vectors [size] of all workers, one below the other: float64 [num_parts, size]."""
    made = zeros(num_parts * size, torch.device("cpu")).view(num_parts, size)
    for number, part in parts.items():
        made[number] = part
    return total(made)


def zeros(size: int, device: torch.device) -> Tensor:
    """Room for numbers that are to be summed: float64 [size] where workers meet, or on `device`."""
    where = meeting_device() if num_workers() > 1 else device
    return torch.zeros(size, dtype=torch.float64, device=where)


DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.bool, torch.uint8,
)  # fmt: skip
MOST_DIMENSIONS = 8


def gathered(
    parts: dict[int, list[Tensor]], num_parts: int, device: torch.device
) -> list[list[Tensor]]:
    """All workers' numbered tensors: for each place in the lists, those of parts 0 to `num_parts`.

    Tensors of one place have one type, and one shape but for their rows. Raises ValueError where
    they have not.
    """
    num_places = int(_largest(max((len(tensors) for tensors in parts.values()), default=0)))
    width = 2 + MOST_DIMENSIONS  # type, dimensions, shape
    facts = {
        number: torch.tensor([_facts(tensor) for tensor in tensors], dtype=torch.float64).flatten()
        for number, tensors in parts.items()
    }
    table = torch.zeros(num_parts, num_places * width, dtype=torch.float64)
    for number, row in facts.items():
        table[number] = row
    shapes = total(table).reshape(num_parts, num_places, width).long()
    found = []
    for place in range(num_places):
        known = shapes[:, place]
        sizes = known[:, 2].tolist()
        kinds = {tuple(row[:2].tolist() + row[3:].tolist()) for row in known if row[1] > 0}
        if len(kinds) != 1:
            raise ValueError("its inputs have different shapes in different micro-batches")
        kind, num_dimensions, *rest = kinds.pop()
        shape = (sum(sizes), *rest[: num_dimensions - 1])
        whole = torch.zeros(shape, dtype=DTYPES[kind], device=device)
        pieces = torch.split(whole, sizes)
        for number, tensors in parts.items():
            pieces[number].copy_(tensors[place])
        if num_workers() > 1:  # each row stands on one worker, all others add 0 to it
            sendable = whole.to(torch.uint8) if whole.dtype == torch.bool else whole
            dist.all_reduce(sendable)
            whole = sendable.to(whole.dtype)
        elif whole.is_floating_point():
            whole += 0  # -0.0 becomes 0.0, as it does when added up
        found.append(list(torch.split(whole, sizes)))
    return found


def _facts(tensor: Tensor) -> list[float]:
    rest = [0] * (MOST_DIMENSIONS - tensor.dim())
    return [DTYPES.index(tensor.dtype), tensor.dim(), *tensor.shape, *rest]


def _largest(number: int) -> int:
    """The largest of the workers' numbers."""
    if num_workers() == 1:
        return number
    value = torch.tensor([number], device=meeting_device())
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def agree(number: int) -> bool:
    """Whether all workers gave this number."""
    most, least = _largest(number), -_largest(-number)  # both, on every worker
    return most == least


def meeting_device() -> torch.device:
    """Where tensors are that workers exchange."""
    on_gpu = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


class Gradients(Protocol):
    """A way to sum gradients over micro-batches and workers."""

    trained: list[nn.Parameter]
    """What gets a gradient."""
    buffers: Buffers
    """What forward passes change besides."""

    def norm(self) -> Tensor:
        """Norm of the whole gradient that `reduce` left."""

    def reduce(
        self, own: Sequence[Microbatch], num_microbatches: int, forward_backward: ForwardBackward,
        riders: Callable[[], Tensor],
    ) -> Tensor:  # fmt: skip
        """Leave in each parameter's `grad` the sum over all micro-batches of all workers.

        A parameter that none of them depends on gets None, as from `backward` on the whole batch.
        `own` are this worker's, `forward_backward` does one of them; a worker may have none.
        `riders`, asked for after the last one, are float64 numbers [R] to be summed as well, each
        of which only one worker has and all others give 0 for; their sums are returned, on the
        host.
        """


# buffers are summed here, not sent by the first worker; the option was renamed in torch 2.13
_RENAMED = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
_OWN_BUFFERS: Any = {
    "forward_sync_buffers" if _RENAMED else "broadcast_buffers": False,
    "init_sync": False,  # all start from one seed, which is checked; and gloo lacks some types
}


def room(parameter: Tensor) -> int:
    """Real numbers that its gradient takes: an even number, where a complex one can begin."""
    return 2 * parameter.numel() if parameter.is_complex() else -(-parameter.numel() // 2) * 2


def kinds(trained: Sequence[Tensor], buffers: Buffers) -> set[torch.dtype]:
    """Types of the real numbers that a step has to sum."""
    return {parameter.dtype.to_real() for parameter in trained} | buffers.dtypes


def with_reached(riders: Tensor, own: Sequence[bool]) -> Tensor:
    """The riders, and behind them which parameters this worker's micro-batches have reached."""
    return torch.cat([riders, riders.new_tensor(own)]) if num_workers() > 1 else riders


def keep_reached(trained: Sequence[Tensor], told: Tensor, own: Sequence[bool]) -> Tensor:
    """Take away the gradients of what no worker has reached; returns the sums of the riders.

    Autograd tells for each micro-batch which parameters its loss depends on: those have a gradient,
    be it 0. What is true of the global batch must not depend on how it is cut, so a parameter has
    one if any micro-batch of any worker reaches it. Optimizers pass over the others, which neither
    decay nor momentum then moves: as after `backward` on the whole batch.
    """
    reached: Sequence[float] = own
    if num_workers() > 1:
        told, flags = told[: -len(own)], told[-len(own) :]
        reached = flags.tolist()
    for parameter, is_reached in zip(trained, reached, strict=True):
        if not is_reached:
            parameter.grad = None
    return told


class _Reporting(torch.autograd.Function):
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


class _Shared(nn.Module):
    """The objective as DDP sees it: takes a batch, or None where a worker has no rows."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective
        self.trained = [p for p in objective.parameters() if p.requires_grad]

    def forward(
        self, batch: Batch | None, shares: Shares | None, counted: Sequence[bool]
    ) -> tuple[Tensor, Tensor]:
        """Numerators [K] with their gradient, and in float64 for the record [K]."""
        if batch is None:
            num_terms, like = len(self.objective.terms), self.trained[0]
            numerators = torch.zeros(num_terms, dtype=like.dtype.to_real(), device=like.device)
            recorded = torch.zeros(num_terms, dtype=torch.float64, device=like.device)
        else:
            numerators, recorded = self.objective(batch, shares, counted)
        reporting: Tensor = _Reporting.apply(numerators, *self.trained)  # type: ignore[no-untyped-call]
        return reporting, recorded


def _summed(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """DDP communication hook: the sum over workers, where DDP's own would take the mean."""
    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])  # type: ignore[no-any-return]


class Overlapped:
    """Gradients summed by DDP while the backward pass still runs; in DDP's order."""

    def __init__(self, objective: Objective, device: torch.device) -> None:
        self.model: nn.Module = objective
        self.trained = [p for p in objective.parameters() if p.requires_grad]
        self.buffers = Buffers(objective)
        self._reached: set[Tensor] = set()  # by identity
        for parameter in self.trained:  # DDP will give all of them a gradient
            parameter.register_post_accumulate_grad_hook(self._note)  # type: ignore[no-untyped-call]
        if num_workers() > 1:
            ids = [device.index] if device.type == "cuda" else None
            wrapped = DistributedDataParallel(_Shared(objective), device_ids=ids, **_OWN_BUFFERS)
            wrapped.register_comm_hook(None, _summed)
            self.model = wrapped

    def reduce(
        self, own: Sequence[Microbatch], num_microbatches: int, forward_backward: ForwardBackward,
        riders: Callable[[], Tensor],
    ) -> Tensor:  # fmt: skip
        """Only the last backward pass of each worker waits for the others."""
        before = self.buffers.copy()
        self._reached.clear()
        for parameter in self.trained:
            parameter.grad = None
        work: Sequence[tuple[int, Batch | None]] = own or [(0, None)]
        for number, batch in work:
            is_last = number == work[-1][0]
            with self._kept_apart() if not is_last else nullcontext():
                forward_backward(self.model, number, batch)
        if num_workers() > 1 and len(before):
            self._agree_on_buffers(before, bool(own))
        reached = [parameter in self._reached for parameter in self.trained]
        return keep_reached(self.trained, total(with_reached(riders(), reached)), reached)

    def _note(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._reached.add(parameter)

    def norm(self) -> Tensor:
        """Norm of the whole gradient."""
        return nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None])

    def _agree_on_buffers(self, before: list[Tensor], has_rows: bool) -> None:
        """Running statistics change by the mean over the workers that had rows."""
        mine = self.buffers.changes(before).double() * has_rows
        summed = total(
            torch.cat([mine.cpu(), torch.tensor([float(has_rows)], dtype=torch.float64)])
        )
        self.buffers.change(before, summed[:-1].to(mine.device), float(summed[-1]), has_rows)

    def _kept_apart(self) -> AbstractContextManager[None]:
        """Backward passes inside only add to this worker's own gradients."""
        return (
            self.model.no_sync()
            if isinstance(self.model, DistributedDataParallel)
            else nullcontext()
        )
