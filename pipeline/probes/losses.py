"""Losses that are unsteady, or whose numbers for a row depend on the rows beside it."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.data.batch import Batch, num_rows, select, to_float64
from pipeline.losses.objective import Objective
from pipeline.probes.calls import Found, close, equal, mode
from pipeline.probes.coupling import SHAPE_RTOL

TIMES = 50
"""How often each is asked about the same rows."""


def coupled(objective: Objective, batch: Batch, size: int) -> Found:
    """Losses whose items or denominator of a row depend on more than the row."""
    faults = []
    if objective.precision == torch.float64:
        batch = to_float64(batch)
    with torch.no_grad(), mode(objective, training=False):
        predictions = objective.predict(batch)
    rows = torch.arange(num_rows(batch))
    pieces = torch.split(rows, size)
    rtol = SHAPE_RTOL[objective.precision]
    for index, term in enumerate(objective.terms):
        if term.loss.per_batch:
            continue

        def counts(chosen: Tensor, seed: int = 1, of: int = index) -> Tensor:
            torch.manual_seed(seed)
            return objective.terms[of].denominator(select(batch, chosen))

        def items(chosen: Tensor, seed: int = 1, of: int = index) -> Tensor:
            parts = {name: value[chosen] for name, value in predictions.items()}
            torch.manual_seed(seed)
            with torch.no_grad():
                items_given = objective.items_of(of, parts, select(batch, chosen))
            return items_given.reshape(len(chosen), -1)

        for ask, what in ((counts, "the denominator"), (items, "the loss")):
            whole = ask(rows)
            if any(not equal([whole], [ask(rows)]) for _ in range(TIMES)):
                fault = f"{what} of a row is different each time"
            elif not equal([whole], [ask(rows, 2)]):
                continue  # it draws random numbers, which follow the micro-batch
            elif not close(torch.cat([ask(piece) for piece in pieces]), whole, rtol):
                fault = f"{what} of a row depends on the rows beside it"
            else:
                continue
            faults.append((f"loss {term.label}", fault))
    return faults
