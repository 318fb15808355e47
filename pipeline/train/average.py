"""Averaged weights, which are evaluated and become the model: part of every checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypedDict

import torch
from torch import Tensor, nn

from pipeline.spec.sections import Average
from pipeline.train.weights import to_cpu


class AverageState(TypedDict):
    """What a checkpoint holds of it."""

    tensors: dict[str, Tensor]
    """Averages of parameters and of buffers of fractions; other buffers as they were last."""
    count: int
    """How many weights the average is of."""


class WeightAverage:
    """Averages of a module's parameters and buffers over steps.

    The formulas are those of `torch.optim.swa_utils.AveragedModel` with `use_buffers`: an
    exponential moving average begins with the weights after the first step, an equal one with those
    of its first time. Until then, and there is no average, the weights themselves are evaluated.
    """

    def __init__(self, settings: Average, num_steps: int, steps_per_epoch: int) -> None:
        self.settings = settings
        self._start, self._every = 0, 1
        if settings.swa is not None:
            self._start = int(settings.swa.start * num_steps)
            self._every = settings.swa.every.in_steps(steps_per_epoch)
        self.state: AverageState = {"tensors": {}, "count": 0}

    def is_due(self, step: int) -> bool:
        """Whether the weights after `step` steps belong to it."""
        return step > self._start and step % self._every == 0

    @torch.no_grad()
    def update(self, step: int, module: nn.Module) -> None:
        """Take in the weights after `step` steps, if they belong to it."""
        if not self.is_due(step):
            return
        averages, count = self.state["tensors"], self.state["count"]
        share = 1.0 / (count + 1) if self.settings.ema is None else 1.0 - self.settings.ema
        for name, tensor in _tensors(module):
            average = averages.get(name)
            if average is None or average.shape != tensor.shape or not _is_averaged(tensor):
                averages[name] = tensor.detach().clone()
            else:
                average.lerp_(tensor, share)
        self.state["count"] = count + 1

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """The module with the averages; afterwards with its own numbers again, to the bit."""
        own = {name: tensor.detach().clone() for name, tensor in _tensors(module)}
        self.apply(module)
        try:
            yield
        finally:
            _copy(own, module)

    def apply(self, module: nn.Module) -> None:
        """Write the averages into the module, if there are any."""
        _copy(self.state["tensors"], module)

    def snapshot(self) -> AverageState:
        """The state on the CPU: later steps do not change it."""
        copied: AverageState = to_cpu(self.state)
        return copied

    def restore(self, state: AverageState, device: torch.device) -> None:
        """Take a snapshot's state."""
        tensors = {name: tensor.to(device, copy=True) for name, tensor in state["tensors"].items()}
        self.state = {"tensors": tensors, "count": state["count"]}


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _is_averaged(tensor: Tensor) -> bool:
    is_fraction = tensor.is_floating_point() or tensor.is_complex()
    return is_fraction and tensor.layout == torch.strided


@torch.no_grad()
def _copy(values: dict[str, Tensor], module: nn.Module) -> None:
    for name, tensor in _tensors(module):
        if name in values and values[name].shape == tensor.shape:
            tensor.copy_(values[name])
