"""What the fixed order of sums costs: steps per second with it, as a share of DDP's own order.

    python -m tests.benchmarks.same_bits [WORKERS]

The same step in both ways on gloo workers, in turns, with as many micro-batches as workers; for a
small model and for one that computes.
"""

from __future__ import annotations

import sys
import time
from statistics import median

import torch
from torch import Tensor, nn

from pipeline import registry
from pipeline.data.batch import Batch
from pipeline.data.columns import Field
from pipeline.data.partition import worker_range
from pipeline.distributed.ddp import OverlappedGradients
from pipeline.distributed.ordered import OrderedGradients
from pipeline.distributed.seeds import Seeds
from pipeline.losses.contract import build
from pipeline.losses.objective import Objective
from pipeline.losses.terms import Term
from pipeline.train.determinism import deterministic
from pipeline.train.step import train_step
from tests.batches import step_batch
from tests.processes import on_workers

CPU = torch.device("cpu")
ROUNDS, STEPS = 7, 20
SIZES = {
    "small: 32-64-64-1, batch 512": (64, 512),
    "large: 32-1024-1024-1, batch 2048": (1024, 2048),
}


class MLP(nn.Module):
    """Two hidden layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(32, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
        )

    def forward(self, batch: Batch) -> Tensor:
        made: Tensor = self.layers(batch["features"]).squeeze(1)
        return made


def seconds(width: int, batch_size: int, ordered: bool, rank: int, num: int) -> list[float]:
    """Seconds of each round of steps."""
    field = Field("y", "number", "double", True)
    term = Term("mse", 1.0, build(registry.losses["mse"], {}), ("prediction",), (field,))
    objective = Objective(MLP(width), ["features"], [term], {"prediction": None})
    way = OrderedGradients if ordered else OverlappedGradients
    gradients = way(objective, Seeds(0, CPU))
    optimizer = torch.optim.AdamW(objective.parameters())
    rows = batch_size // num
    own: list[tuple[int, Batch]] = [
        (i, {"features": torch.randn(rows, 32), "y": torch.randn(rows)})
        for i in worker_range(num, rank, num)
    ]
    found = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        with deterministic(ordered):
            for step in range(STEPS):
                batch = step_batch(objective, own, num, step)
                train_step(objective, optimizer, gradients, batch)
        found.append(time.perf_counter() - started)
    return found[1:]


def all_sizes(rank: int, num: int) -> list[tuple[float, float]]:
    """Median seconds in DDP's order and in the fixed one, per size, in turns."""
    found = []
    for width, batch_size in SIZES.values():
        turns = [
            [seconds(width, batch_size, way, rank, num) for way in (False, True)] for _ in "ab"
        ]
        ddp, fixed = ([s for turn in turns for s in turn[way]] for way in (0, 1))
        found.append((median(ddp), median(fixed)))
    return found


def main(num_workers: int) -> None:
    """Print the ratios."""
    for name, (ddp, fixed) in zip(SIZES, on_workers(num_workers, all_sizes)[0], strict=True):
        print(f"{name}: DDP {STEPS / ddp:.0f} steps/s, fixed order {STEPS / fixed:.0f}, "
              f"{ddp / fixed:.2f} of DDP")  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
