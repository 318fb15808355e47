"""What the fixed order of sums costs: steps per second with it, as a share of DDP's own order.

The same step in both ways on gloo workers, in turns, with as many micro-batches as workers; for a
small model and for one that computes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from pipeline import registry
from pipeline.data.batch import Batch
from pipeline.data.columns import Number
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
from tests.benchmarks.harness import Result
from tests.processes import on_workers

CPU = torch.device("cpu")
ROUNDS, STEPS, WORKERS = 7, 20, (2, 3)
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


def mlp_objective(width: int) -> Objective:
    """The mean squared error of an MLP."""
    field = Number("y", "double", "target")
    term = Term("mse", 1.0, build(registry.losses["mse"], {}), ("prediction",), (field,))
    return Objective(MLP(width), ["features"], [term], {"prediction": None})


def seconds(
    rounds: int, width: int, batch_size: int, ordered: bool, rank: int, num: int
) -> list[float]:
    """Seconds of each round of steps, but for a first one."""
    objective = mlp_objective(width)
    way = OrderedGradients if ordered else OverlappedGradients
    gradients = way(objective, Seeds(0, CPU))
    optimizer = torch.optim.AdamW(objective.parameters())
    rows = batch_size // num
    own: list[tuple[int, Batch]] = [
        (i, {"features": torch.randn(rows, 32), "y": torch.randn(rows)})
        for i in worker_range(num, rank, num)
    ]
    found = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        with deterministic(ordered):
            for step in range(STEPS):
                batch = step_batch(objective, own, num, step)
                train_step(objective, optimizer, gradients, batch)
        found.append(time.perf_counter() - started)
    return found[1:]


def all_sizes(rounds: int, rank: int, num: int) -> list[tuple[float, float]]:
    """Median seconds in DDP's order and in the fixed one, per size, in turns."""
    found = []
    for width, batch_size in SIZES.values():
        turns = [
            [seconds(rounds, width, batch_size, way, rank, num) for way in (False, True)]
            for _ in "ab"
        ]
        ddp, fixed = ([s for turn in turns for s in turn[way]] for way in (0, 1))
        found.append((median(ddp), median(fixed)))
    return found


def results(rounds: int, quick: bool) -> Iterator[Result]:
    """Steps per second in DDP's order and in the fixed one."""
    for num in (2,) if quick else WORKERS:
        measured = on_workers(num, partial(all_sizes, rounds))[0]
        for name, (ddp, fixed) in zip(SIZES, measured, strict=True):
            yield {
                "case": name, "workers": num, "ddp_steps_per_second": STEPS / ddp,
                "fixed_order_steps_per_second": STEPS / fixed, "of_ddp": ddp / fixed,
            }  # fmt: skip
