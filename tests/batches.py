"""Batches of steps for tests and benchmarks that make their rows themselves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.data.batch import Batch
from pipeline.data.loader import StepBatch
from pipeline.losses.objective import Objective


def step_batch(
    objective: Objective, microbatches: Sequence[tuple[int, Batch]], num_microbatches: int,
    step: int = 0,
) -> StepBatch:  # fmt: skip
    """A batch of which this worker has the given micro-batches, with their counts."""
    rows = [np.arange(0)] * num_microbatches
    counts = {index: objective.denominators(batch) for index, batch in microbatches}
    return StepBatch(step, rows, list(microbatches), counts)
