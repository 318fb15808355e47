"""Items of all validation rows in one place, for metrics that need them all at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from pipeline.distributed import comm
from pipeline.losses.targets import Items
from pipeline.train.term_metrics import Reading, TermMetric

MAX_GATHERED = 20_000_000
"""Predicted numbers of one term that are gathered at most."""
CPU = torch.device("cpu")


class GatheredItems:
    """The items of each batch that this worker evaluates, and then those of all workers."""

    def __init__(self, readings: Mapping[Reading, int]) -> None:
        """Those of each reading, from every batch (1), or from every second one (2), and so on."""
        self.readings = readings
        self._parts: dict[Reading, dict[int, Items]] = {reading: {} for reading in readings}
        self._sizes = dict.fromkeys(readings, 0)

    def add(self, index: int, items: Mapping[Reading, Items]) -> None:
        """The items of batch `index`; forgotten again where they become too many."""
        for reading, every in self.readings.items():
            if index % every:
                continue
            self._sizes[reading] += items[reading].prediction.numel()
            if self._sizes[reading] <= MAX_GATHERED:
                # copies: the next batch is gathered in the memory of this one
                own = Items(*(tensor.to(CPU, copy=True) for tensor in items[reading]))
                self._parts[reading][index] = own
            else:
                self._parts[reading].clear()

    def gather(self, num_batches: int) -> dict[Reading, Items | None]:
        """The items of all workers, in the order of the batches; None where they are too many."""
        if not self.readings:
            return {}
        sizes = comm.all_reduce(torch.tensor(list(self._sizes.values())))
        return {
            reading: self._join(self._parts[reading], num_batches) if size <= MAX_GATHERED else None
            for reading, size in zip(self.readings, sizes.tolist(), strict=True)
        }

    @staticmethod
    def _join(parts: Mapping[int, Items], num_batches: int) -> Items:
        slots = {index: list(items) for index, items in parts.items()}
        pieces = comm.gather_parts(slots, num_batches, CPU)
        return Items(*(torch.cat(tensors) for tensors in pieces))


def values_of_all(
    metrics: Sequence[TermMetric], gathered: Mapping[Reading, Items | None]
) -> dict[TermMetric, float | None]:
    """Each metric over all items, which have to be all; None where they are too many.

    The first worker computes them, and tells the others.
    """
    values = torch.zeros(len(metrics), dtype=torch.float64)
    if comm.rank() == 0:
        for place, one in enumerate(metrics):
            items = gathered[one.reading]
            values[place] = math.nan if items is None else one.value_of_all(items)
    values = comm.all_reduce(values)
    return {
        one: None if gathered[one.reading] is None else value
        for one, value in zip(metrics, values.tolist(), strict=True)
    }
