"""How much the trained model relies on each input: what shuffling it among rows costs."""

from __future__ import annotations

import time

import numpy as np
import torch

from pipeline.data.batch import Batch, num_rows, only, select, to_device
from pipeline.data.dataset import Dataset
from pipeline.distributed.seeds import Seeds
from pipeline.losses.modes import evaluating
from pipeline.losses.objective import Objective
from pipeline.rundir.records import Importance

MAX_ROWS = 1000
"""Validation rows, evenly spaced, whose inputs are shuffled."""
REPEATS = 3
"""Shuffles of each input, whose mean is taken."""
SECONDS = 2.0
"""After which the inputs that are left are left out."""


@torch.no_grad()
def permutation_importance(
    objective: Objective,
    dataset: Dataset,
    batch_size: int,
    device: torch.device,
    seconds: float = SECONDS,
) -> Importance | None:
    """What the validation loss rises by for each input; None with fewer than two of them.

    Takes up to `seconds`, and one input more.
    """
    if len(objective.inputs) < 2:
        return None
    until = time.monotonic() + seconds
    rows = np.linspace(0, len(dataset) - 1, min(len(dataset), MAX_ROWS)).astype(np.int64)
    batch = dataset.gather(rows)
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(rows), generator=generator) for _ in range(REPEATS)]
    rises: dict[str, float] = {}
    with evaluating(objective):
        loss = _loss(objective, batch, batch_size, device)
        for name in objective.inputs:
            if time.monotonic() > until:
                break
            shuffled = [select(only(batch, (name,)), order) for order in orders]
            losses = [
                _loss(objective, {**batch, **column}, batch_size, device) for column in shuffled
            ]
            rises[name] = sum(losses) / REPEATS - loss
    left_out = [name for name in objective.inputs if name not in rises]
    return Importance(loss=loss, num_rows=len(rows), rises=rises, left_out=left_out)


def _loss(objective: Objective, batch: Batch, batch_size: int, device: torch.device) -> float:
    """The sum of the job's losses over the rows, NaN where one has no items."""
    numerators, denominators = torch.zeros(2, len(objective.terms), dtype=torch.float64)
    seeds = Seeds(0, device)
    for index, rows in enumerate(torch.split(torch.arange(num_rows(batch)), batch_size)):
        part = select(batch, rows)
        denominators += objective.denominators(part)
        part = to_device(part, device)
        seeds.set(0, index)  # for a model that draws even here
        items = objective.items(objective.predict(part), part)
        numerators += torch.stack([item.double().sum() for item in items]).cpu()
    weights = torch.tensor([term.weight for term in objective.terms], dtype=torch.float64)
    return float((weights * numerators / denominators).sum())
