"""Interface of the two ways to sum gradients: in a fixed order (`ordered`), or by DDP (`ddp`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from pipeline.data.batch import Batch, to_device
from pipeline.data.loader import StepBatch
from pipeline.distributed import comm
from pipeline.distributed.buffers import Buffers
from pipeline.distributed.seeds import Seeds
from pipeline.losses.objective import Objective


class Gradients(ABC):
    """Gradients of a global batch, summed over its micro-batches and over workers.

    A step iterates over `microbatches`, then calls `all_reduce` and `clip`.
    """

    def __init__(
        self, objective: Objective, seeds: Seeds, changing: Mapping[str, bool] | None = None
    ) -> None:
        """`changing`: buffers that forward passes change, and whether they add up over rows."""
        self.model: nn.Module = objective
        """Model and losses, to be called with rows, shares and which terms count."""
        self.trained = [p for p in objective.parameters() if p.requires_grad]
        self.buffers = Buffers(objective, changing or {})
        self.seeds = seeds
        self._buffers_before: list[Tensor] = []

    @abstractmethod
    def microbatches(self, batch: StepBatch) -> Iterator[tuple[int, Batch | None]]:
        """This worker's micro-batches, one after the other: their index and rows on the device.

        The caller runs `model` and `backward` on each before it takes the next one. Random numbers
        and buffers are set for each. None stands for the rows of a worker that has none.
        """

    @abstractmethod
    def all_reduce(self, message: Tensor) -> Tensor:
        """Leave in each parameter's `grad` the sum over all micro-batches of all workers.

        A parameter that none of them depends on gets None, as from `backward` on the whole batch.
        `message` are float64 numbers [R] to be summed as well, each given by one worker and 0 on
        all others; their sums are returned, on the CPU.
        """

    @abstractmethod
    def norm(self) -> Tensor:
        """Norm of the global gradient."""

    def clip(self, clip_norm: float | None) -> float:
        """Scale the global gradient down to `clip_norm` if its norm is larger; return that norm."""
        norm = self.norm()
        if clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.trained, clip_norm, norm)
        return float(norm)

    def restore_buffers(self) -> None:
        """Set the buffers to what they were before the step."""
        self.buffers.restore(self._buffers_before)

    def _begin(self, batch: StepBatch) -> None:
        """Take the buffers' values from which each micro-batch of the step starts."""
        self._step, self._num_microbatches = batch.step, batch.num_microbatches
        self._has_rows = bool(batch.microbatches)
        self._buffers_before = self.buffers.copy()

    def _prepare(self, index: int, rows: Batch | None) -> tuple[int, Batch | None]:
        self.seeds.set(self._step, index)  # dropout follows the rows, not the worker
        return index, None if rows is None else to_device(rows, self.seeds.device)


def append_reached(message: Tensor, reached: Sequence[bool]) -> Tensor:
    """The message followed, if there are other workers, by which parameters this one reached."""
    if comm.num_workers() == 1:
        return message
    return torch.cat([message, message.new_tensor(reached)])


def drop_unreached(trained: Sequence[Tensor], message: Tensor, reached: Sequence[bool]) -> Tensor:
    """Set to None the gradients that no worker reached; return the message without its flags.

    Autograd tells for each micro-batch which parameters its loss depends on: those have a gradient,
    be it 0. What is true of the global batch must not depend on how it is cut, so a parameter has
    one if any micro-batch of any worker reaches it. Optimizers skip the others, which neither decay
    nor momentum then moves: as after `backward` on the whole batch.
    """
    num_reaching: Sequence[float] = reached
    if comm.num_workers() > 1:
        num_reaching = message[-len(reached) :].tolist()
        message = message[: -len(reached)]
    for parameter, num_workers in zip(trained, num_reaching, strict=True):
        if not num_workers:
            parameter.grad = None
    return message
