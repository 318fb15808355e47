"""Items of all validation rows in one place, for metrics that need them all at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch

from pipeline.distributed import comm
from pipeline.losses.targets import Items
from pipeline.train.term_metrics import Reading, TermMetric

MAX_GATHERED = 20_000_000
"""Predicted numbers of one term that are gathered at most."""
CPU = torch.device("cpu")


class GatheredItems:
    """The items of each batch that this worker evaluates, and then those of all workers."""

    def __init__(self, readings: Iterable[Reading]) -> None:
        self._parts: dict[Reading, dict[int, Items]] = {reading: {} for reading in readings}
        self._sizes = dict.fromkeys(self._parts, 0)

    def add(self, index: int, items: Mapping[Reading, Items]) -> None:
        """The items of batch `index`; forgotten again where they become too many."""
        for reading, parts in self._parts.items():
            self._sizes[reading] += items[reading].prediction.numel()
            if self._sizes[reading] <= MAX_GATHERED:
                # copies: the next batch is gathered in the memory of this one
                parts[index] = Items(*(tensor.to(CPU, copy=True) for tensor in items[reading]))
            else:
                parts.clear()

    def values(
        self, metrics: Sequence[TermMetric], num_batches: int
    ) -> dict[TermMetric, float | None]:
        """Each metric over the items of all batches, in their order; None where they are too many.

        The first worker computes them, and tells the others.
        """
        if not metrics:
            return {}
        sizes = comm.all_reduce(torch.tensor(list(self._sizes.values())))
        whole = {
            reading: self._gather(parts, num_batches) if size <= MAX_GATHERED else None
            for (reading, parts), size in zip(self._parts.items(), sizes.tolist(), strict=True)
        }
        values = torch.zeros(len(metrics), dtype=torch.float64)
        if comm.rank() == 0:
            for place, one in enumerate(metrics):
                items = whole[one.reading]
                values[place] = math.nan if items is None else one.value_of_all(items)
        values = comm.all_reduce(values)
        return {
            one: None if whole[one.reading] is None else value
            for one, value in zip(metrics, values.tolist(), strict=True)
        }

    def _gather(self, parts: Mapping[int, Items], num_batches: int) -> Items:
        slots = {index: list(items) for index, items in parts.items()}
        pieces = comm.gather_parts(slots, num_batches, CPU)
        return Items(*(torch.cat(tensors) for tensors in pieces))
