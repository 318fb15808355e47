"""Which component breaks a promise: found by asking each one by itself, on real rows."""

from __future__ import annotations

import torch

from pipeline.data.batch import Batch, num_rows, select
from pipeline.losses.objective import Objective
from pipeline.probes import coupling, losses, optimizers
from pipeline.probes.calls import in_float64, total
from pipeline.probes.steadiness import unsteady

__all__ = ["MAX_ROWS", "suspects", "total"]

MAX_ROWS = 61  # odd, so that it is hardly the size of another dimension
FEW_ROWS = 5  # for what is asked many times


def suspects(
    objective: Objective,
    batch: Batch,
    microbatch_size: int,
    optimizer: tuple[str, optimizers.Build] | None = None,
    times: int = 3,
) -> list[str]:
    """Faults, by component: what depends on more than its rows and the seed.

    Of modules, the innermost.

    `batch` is a whole global batch, on the CPU; losses are asked about it as the step would cut
    it. Modules are asked `times` times, as many as a run would. `optimizer` is its name, and how it
    is built.
    """
    few = select(batch, torch.arange(min(num_rows(batch), MAX_ROWS)))
    fewest = select(batch, torch.arange(min(num_rows(batch), FEW_ROWS)))
    faults = unsteady(objective, few, 3) or unsteady(objective, fewest, times)
    if not faults:  # what is unsteady would look as if its rows were coupled
        wide = in_float64(objective, few)
        faults = coupling.coupled(wide, few, microbatch_size)
        faults += losses.coupled(wide, batch, microbatch_size)
    if optimizer is not None:
        faults += optimizers.unfaithful(*optimizer, list(objective.named_parameters()))
    return [f"{component}: {fault}" for component, fault in faults]
