"""Whether a job's metrics work, and have one value on any number of workers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from pipeline.data.dataset import Dataset
from pipeline.errors import UsageError
from pipeline.losses.modes import evaluating
from pipeline.losses.objective import Objective
from pipeline.tracebacks import describe
from pipeline.train.term_metrics import TermMetric

FEW_ROWS = 64
"""On which metrics are tried before training."""


@torch.no_grad()
def try_metrics(
    objective: Objective, dataset: Dataset, metrics: Sequence[TermMetric], num_rows: int
) -> None:
    """Ask each metric about the first validation rows, at once and in two parts.

    Raises UsageError for one that fails, or whose sums do not add up: it would have another value
    on another number of workers.
    """
    rows = np.arange(min(len(dataset), FEW_ROWS, num_rows))
    batch = dataset.gather(rows)
    with evaluating(objective):
        predictions = objective.predict(batch)
    for metric in metrics:
        try:
            items = metric.reading.items(objective, predictions, batch, torch.from_numpy(rows))
            if metric.needs_all:
                metric.value_of_all(items)
                continue
            size = metric.sums(metric.reading.no_items(objective)).numel()
            half = len(items.truth) // 2
            total = metric.sums(items, size)
            halves = items.part(slice(half)), items.part(slice(half, None))
            parts = [metric.sums(part, size) for part in halves if len(part.truth)]
            with suppress(ValueError):  # as of few rows of one class
                metric.value(total)
        except UsageError:
            raise
        except Exception as error:  # a user's metric can fail in any way
            problem = f"fails on the first rows: {describe(error)}"
            raise UsageError(f"metrics: {metric.place} {problem}") from error
        if parts and not torch.allclose(sum(parts, torch.zeros_like(total)), total, equal_nan=True):
            halves_text = " and ".join(map(_show, parts))
            raise UsageError(
                f"metrics: {metric.place} gives sums that do not add up: {_show(total)} "
                f"for {len(items.truth)} items, {halves_text} for two parts of them; "
                "return sums over the items and their number, and divide in `value`"
            )


def _show(sums: Tensor) -> str:
    values = [f"{value:.6g}" for value in sums[:4].tolist()]
    return f"[{', '.join(values)}{', ...' if len(sums) > 4 else ''}]"
