"""Which component breaks a promise: found by asking each one by itself, on real rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.data.batch import Batch, num_rows, select
from pipeline.losses.objective import Objective
from pipeline.suspects import losses, modules, optimizers
from pipeline.suspects.calls import in_float64, total

__all__ = ["MOST_ROWS", "Suspect", "suspects", "total"]

MOST_ROWS = 61  # odd, so that it is hardly the size of another dimension
FEW_ROWS = 5  # for what is asked many times

Build = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Suspect:
    """A component, and what it does that no exact run can bear."""

    component: str
    fault: str

    def __str__(self) -> str:
        return f"{self.component}: {self.fault}"


def suspects(
    objective: Objective,
    batch: Batch,
    microbatch_size: int,
    optimizer: tuple[str, Build] | None = None,
    times: int = 3,
) -> list[Suspect]:
    """Components that depend on more than their rows and the seed; innermost modules first.

    `batch` is a whole global batch, on the CPU; losses are asked about it as the step would cut
    it. Modules are asked `times` times, as many as a run would. `optimizer` is its name, and how it
    is built.
    """
    return [Suspect(*pair) for pair in _found(objective, batch, microbatch_size, optimizer, times)]


def _found(
    objective: Objective, batch: Batch, size: int, optimizer: tuple[str, Build] | None, times: int
) -> Iterator[tuple[str, str]]:
    few = select(batch, torch.arange(min(num_rows(batch), MOST_ROWS)))
    fewest = select(batch, torch.arange(min(num_rows(batch), FEW_ROWS)))
    found = modules.unsteady(objective, few, 3) or modules.unsteady(objective, fewest, times)
    if not found:  # else one cannot be told from the other
        wide = in_float64(objective, few)
        found = modules.coupled(wide, few)
        found += losses.coupled(wide, batch, size)
    yield from found
    if optimizer is not None:
        yield from optimizers.unfaithful(*optimizer, list(objective.parameters()))
