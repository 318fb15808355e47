"""Workers are killed, and a run resumes with another number of them: the same bits as undisturbed.

Real gloo processes and real SIGKILLs, three workers or more: two cannot show an order of sums.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.multiprocessing.spawn import ProcessException

from pipeline import registry
from pipeline.distributed import ordered
from pipeline.errors import UsageError
from pipeline.rundir import RunDir
from pipeline.rundir.journal import Reader, curve_sha256
from pipeline.spec import load
from pipeline.train import determinism, fault_injection
from pipeline.train.job import prepare
from pipeline.train.loop import train
from tests.processes import on_workers
from tests.scenarios.test_same_bits import transformer

STEPS = 40


def spec_of(data: Path, microbatch_size: int | None) -> dict[str, Any]:
    return transformer(data) | {
        "training": {"batch_size": 13, "microbatch_size": microbatch_size, "epochs": 10},
        "optimizer": {"name": "adamw", "lr": 1e-3}, "schedule": "cosine",
        "checkpoint": {"every_steps": 5, "keep": 2},
    }  # fmt: skip


def worked(
    tree: dict[str, Any], folder: Path, kills: Any, by_ddp: bool, rank: int, num: int
) -> None:
    job = prepare(load(tree), folder)
    if by_ddp:
        ordered.SMALL = 0
    run = RunDir(folder)
    train(job, run, fault_injection.plan_faults(kills, run, rank), STEPS)


def trained(
    tree: dict[str, Any],
    folder: Path,
    attempts: Sequence[tuple[int, list[tuple[int, int]]]],
    by_ddp: bool = False,
) -> dict[str, Any]:
    """What the run left after attempts of (number of workers, ranks and steps of kills)."""
    folder.mkdir()
    for num, kills in attempts:
        try:
            on_workers(num, partial(worked, tree, folder, kills, by_ddp))
        except ProcessException:
            assert kills, "an attempt without a kill failed"
    points = list(Reader(folder / "curve.jsonl").new())
    done = json.loads((folder / "done.json").read_text())
    return {
        "curve": curve_sha256(points),
        "weights": done["weights_sha256"],
        "validation": [(p["step"], p["validation"]) for p in points if "validation" in p],
        "steps": [p["step"] for p in points if "train" in p],
        "first_difference": done["first_difference"],
        "starts": [
            (p["step"], p["workers"]) for p in points if "event" in p and p["event"] == "start"
        ],
    }


SAME = ("curve", "weights", "validation", "steps", "first_difference")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


@pytest.fixture(scope="module")
def undisturbed(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = trained(spec_of(rows, 2), tmp_path_factory.mktemp("alone") / "run", [(1, [])])
    assert found["steps"] == list(range(1, STEPS + 1))
    return found


def test_a_resume_on_other_numbers_of_workers_changes_no_bit(
    rows: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    attempts = [(3, [(1, 13)]), (2, [(0, 24)]), (5, [(4, 31), (2, 31)]), (4, [])]
    found = trained(spec_of(rows, 2), tmp_path / "run", attempts)
    assert {key: found[key] for key in SAME} == {key: undisturbed[key] for key in SAME}
    assert [workers for _, workers in found["starts"]] == [3, 2, 5, 4]
    assert all(step > 0 for step, _ in found["starts"][1:]), "each resumed from a checkpoint"


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.chaos)])
def test_random_kills_change_no_bit(
    rows: Path, undisturbed: dict[str, Any], tmp_path: Path, seed: int
) -> None:
    drawn = random.Random(seed)
    steps = sorted(drawn.sample(range(STEPS), 3))
    attempts = [
        (num := drawn.randint(3, 5), [(drawn.randrange(num), step)]) for step in steps
    ]  # fmt: skip
    found = trained(spec_of(rows, 2), tmp_path / "run", [*attempts, (3, [])])
    assert {key: found[key] for key in SAME} == {key: undisturbed[key] for key in SAME}


@pytest.mark.parametrize("by_ddp", [True, False])
def test_the_comparison_can_see_what_plain_ddp_does_to_a_resumed_run(
    by_ddp: bool, rows: Path, tmp_path: Path
) -> None:
    """Without micro-batches, a small model's gradient is not left to DDP."""
    tree = spec_of(rows, None)
    tree["model"] |= {"dropout": 0.0}
    whole = trained(tree, tmp_path / "whole", [(3, [])], by_ddp)
    killed = trained(tree, tmp_path / "killed", [(3, [(1, 23)]), (3, [])], by_ddp)
    assert whole["steps"] == killed["steps"]
    assert (whole["weights"] != killed["weights"]) == by_ddp


def test_a_finished_run_whose_curve_was_cut_is_not_finished(rows: Path, tmp_path: Path) -> None:
    tree = spec_of(rows, 2)
    whole = trained(tree, tmp_path / "run", [(1, [])])
    path = tmp_path / "run" / "curve.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: len(lines) // 2]))
    assert not RunDir(tmp_path / "run").is_intact
    on_workers(1, partial(worked, tree, tmp_path / "run", [], False))
    points = list(Reader(path).new())
    assert curve_sha256(points) == whole["curve"]
    found = [(p["step"], p["validation"]) for p in points if "validation" in p]
    assert found == whole["validation"]


def test_streamed_rows_change_no_bit_either(rows: Path, tmp_path: Path) -> None:
    """Blocks come in other workers' time, and from files that are cut otherwise."""
    tree = spec_of(rows, 2)
    tree["data"] |= {"stream": {"block_rows": 11, "window": 2}}
    whole = trained(tree, tmp_path / "whole", [(1, [])])
    assert whole["steps"] == list(range(1, STEPS + 1))
    table = pq.read_table(tree["data"]["train"])
    (tmp_path / "parts").mkdir()
    for start in range(0, len(table), 17):
        pq.write_table(
            table.slice(start, 17), tmp_path / "parts" / f"{start:03}.parquet", row_group_size=5
        )
    tree["data"] |= {"train": str(tmp_path / "parts")}
    found = trained(tree, tmp_path / "run", [(3, [(1, 13)]), (5, [(4, 31), (2, 31)]), (4, [])])
    assert {key: found[key] for key in SAME} == {key: whole[key] for key in SAME}


def test_a_resume_with_other_software_is_reported(
    rows: Path, undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bits are not promised, so a run that is resumed elsewhere says from which step."""
    job, folder = prepare(load(spec_of(rows, 2)), tmp_path), tmp_path / "run"
    folder.mkdir()
    train(job, RunDir(folder), num_steps=20)
    shutil.rmtree(folder / "checkpoints" / "step-0000000020")
    (folder / "done.json").unlink()
    real = determinism.fingerprint
    monkeypatch.setattr(determinism, "fingerprint", lambda spec: real(spec) | {"torch": "2.99"})
    train(job, RunDir(folder), num_steps=STEPS)
    points = Reader(folder / "curve.jsonl").new()
    (event,) = [p for p in points if "event" in p and p["event"] == "bits"]
    assert event["step"] == 15
    assert event["text"].startswith(f"torch {torch.__version__} -> 2.99: after step 15 ")


def started_apart(tree: dict[str, Any], folder: Path, rank: int, num: int) -> str:
    """What a worker says whose model draws from elsewhere."""

    @registry.models.register("t_numpy_start")
    class Numpy(torch.nn.Module):
        """Weights that no seed of torch reaches."""

        def __init__(self, inputs: Any, outputs: Any) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.from_numpy(np.random.default_rng().random(1)))

        def forward(self, batch: Any) -> Any:
            return batch["a"] * self.weight.float()

    try:
        train(prepare(load(tree), folder), RunDir(folder), num_steps=1)
    except UsageError as error:
        return str(error)
    return ""


def test_weights_that_start_differently_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1.0, 2.0, 3.0], "y": [1.0, 2.0, 3.0]}), tmp_path / "a.parquet")
    tree = {
        "name": "t", "loss": "mse", "model": "t_numpy_start",
        "data": {"train": str(tmp_path / "a.parquet"), "target": "y"},
    }  # fmt: skip
    said = on_workers(3, partial(started_apart, tree, tmp_path))
    assert all("start differently on each worker" in text for text in said)
