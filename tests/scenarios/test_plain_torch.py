"""Whole runs against a plain torch loop, over jobs, models, types, layouts, cuts and workers."""

from __future__ import annotations

import tempfile
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pipeline
from pipeline import plugins, registry
from pipeline.rundir import RunDir
from pipeline.rundir.journal import Reader
from pipeline.spec import load
from pipeline.train.job import Job, prepare
from pipeline.train.loop import train
from pipeline.verify import plain
from tests.conftest import JOBS
from tests.processes import on_workers
from tests.scenarios.test_same_bits import JOB_NAMES, TRANSFORMER, transformer

STEPS = 12
TOLERANCES = {"float64": 1e-10, "float32": 1e-4}
"""Of a loss; a fault of layout or reach is of the size of the loss itself."""
TOUCHY = {("embedding", "float32"): 1e-2}  # the hardest triplets hang on the last bits of distances


@pipeline.models.register("t_permuted")
def permuted(inputs: Any, outputs: Any, *, of: str, options: dict[str, Any]) -> nn.Module:
    """A built-in model with its weights laid out otherwise: channels_last, or columns first."""
    model: nn.Module = registry.models[of].build(inputs, outputs, **options)
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)
        elif parameter.dim() > 1:
            parameter.data = parameter.data.movedim(0, -1).contiguous().movedim(-1, 0)
    return model


def job(name: str, precision: str, layout: str, cut: str, folder: Path) -> Job:
    source: Any = transformer(folder) if name == TRANSFORMER else JOBS / f"{name}.yaml"
    spec = load(source)
    model = {"name": spec.model.name, **spec.model.options}
    if name == TRANSFORMER:
        model |= {"dropout": 0.0}  # which would follow the worker's share of whole batches
    if layout == "permuted":
        options = {key: value for key, value in model.items() if key != "name"}
        outputs = {"outputs": model.pop("outputs")} if "outputs" in model else {}
        model = {"name": "t_permuted", "of": model["name"], "options": options, **outputs}
    size = max(spec.training.batch_size // 5, 1) if cut == "micro-batches" else None
    changes: dict[str, Any] = {
        "model": model, "training.precision": precision, "training.microbatch_size": size,
    }  # fmt: skip
    tree = load(source, changes).model_dump(mode="json")
    return prepare(load(tree), JOBS)


CASES = [
    *product(JOB_NAMES, ("float32", "float64"), ("contiguous", "permuted"),
             ("whole", "micro-batches")),
]  # fmt: skip


def losses(case: tuple[str, str, str, str]) -> list[list[float | None]]:
    """Each term's loss in each of the first steps; empty on all workers but the first."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        train(job(*case, folder), RunDir(folder), num_steps=STEPS)
        points = (
            list(Reader(folder / "curve.jsonl").new()) if (folder / "done.json").exists() else []
        )
        return [list(point["terms"].values()) for point in points if "terms" in point]


def all_losses(rank: int, num: int) -> dict[Any, Any]:
    plugins.load([str(JOBS / "custom_loss.py")])
    return {case: losses(case) for case in CASES}


@cache
def on(num: int) -> dict[Any, Any]:
    found: dict[Any, Any] = on_workers(num, all_losses)[0]
    return found


@cache
def plainly(case: tuple[str, str, str, str]) -> list[list[float | None]]:
    plugins.load([str(JOBS / "custom_loss.py")])
    with tempfile.TemporaryDirectory() as place:
        made = job(*case, Path(place))
        points, _ = plain.steps(made, min(STEPS, made.num_steps))
        return [list(point["terms"].values()) for point in points]


def apart(one: list[list[Any]], other: list[list[Any]]) -> float:
    assert len(one) == len(other) > 0
    largest: float = max(
        abs(a - b) / max(abs(a), abs(b), 1e-300)
        for here, there in zip(one, other, strict=True)
        for a, b in zip(here, there, strict=True)
    )
    return largest


@pytest.mark.jobs
@pytest.mark.parametrize("num", [1, 3])
@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_a_job_trains_as_a_plain_torch_loop_does(case: Any, num: int) -> None:
    name, precision, *_ = case
    found = apart(on(num)[case], plainly(case))
    print(f"{', '.join(case)}, {num} workers: {found:.1e}")
    assert found <= TOUCHY.get((name, precision), TOLERANCES[precision])


def by_hand(name: str, build: Any, criterion: Any) -> list[float]:
    """The losses of a job's first steps with nothing but torch, from its rows and its model."""
    made = prepare(load(JOBS / f"{name}.yaml"), JOBS)
    spec, order = made.spec, made.sampler()
    model = made.objective().model
    optimizer = build(model.parameters())
    (target,) = spec.data.targets
    found = []
    for step in range(STEPS):
        warmup = spec.schedule.warmup_steps
        progress = (step - warmup) / (made.num_steps - warmup)
        factor = (step + 1) / warmup if step < warmup else 0.5 * (1 + np.cos(np.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = spec.optimizer.options["lr"] * factor
        batch = made.train.gather(order.rows(step))
        optimizer.zero_grad()
        loss = criterion(model(batch)["prediction"], batch[target])
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize(
    ("name", "build", "criterion"),
    [
        ("diabetes", lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1), F.mse_loss),
        (
            "digits",
            lambda p: torch.optim.AdamW(p, lr=3e-3),
            lambda p, t: F.cross_entropy(p, t.long()),
        ),
    ],
)
def test_the_plain_loop_is_what_anyone_would_write(name: str, build: Any, criterion: Any) -> None:
    points, _ = plain.steps(prepare(load(JOBS / f"{name}.yaml"), JOBS), STEPS)
    assert by_hand(name, build, criterion) == pytest.approx(
        [point["train"]["loss"] for point in points], rel=1e-5
    )
