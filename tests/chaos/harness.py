"""Runs of three and more workers that start in a moment, to be disturbed a hundred times over.

Workers are gloo processes forked from a server that has imported everything; without Ray.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.rundir import RunDir
from tests.chaos.disk import Disk, failing
from tests.processes import FORKED

STEPS = 24
PATIENCE_SECONDS = 60.0
Case = tuple[Path, dict[str, Any], dict[str, Any]]
"""A folder, a job spec, and what an undisturbed run of it left."""


def spec_of(folder: Path, **training: Any) -> dict[str, Any]:
    """A model with dropout and Adam over 70 rows, 24 steps of three micro-batches and more."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(70, 3))
    table = {
        "a": x[:, 0], "b": x[:, 1], "c": x[:, 2], "y": x @ [1.0, -2.0, 0.5],
        "flag": x[:, 0] + rng.normal(size=70) > 0.5, "often": rng.uniform(0.5, 2, 70),
    }  # fmt: skip
    if not (folder / "rows.parquet").exists():
        pq.write_table(pa.table(table), folder / "rows.parquet")
    about = {
        "batch_size": 16, "microbatch_size": 3, "epochs": 6, "clip_norm": 1.0, "best_by": "rmse",
        "evaluate_every": {"steps": 4}, "stop": {"metric": "mae", "patience": 100},
        "average": {"ema": 0.8}, "threshold": "f1",
    }  # fmt: skip
    return {
        "name": "chaos",
        "loss": [{"name": "mse", "target": "y"}, {"name": "bce_with_logits", "target": "flag",
                                                 "prediction": "flag"}],
        "data": {
            "train": str(folder / "rows.parquet"), "target": ["y", "flag"], "validation": 0.2,
            "test": 0.1, "inputs": ["a", "b", "c"], "sampling": {"weights": "often"},
        },
        "model": {"name": "mlp", "hidden": [8], "dropout": 0.2},
        "training": about | training,
        "optimizer": {"name": "adamw", "lr": 1e-2, "groups": [{"match": "*.bias", "lr": 5e-3}]},
        "schedule": {"name": "reduce_on_plateau", "metric": "mae", "patience": 1},
        "checkpoint": {"every_steps": 4, "keep": 2},
        "cache": {"folder": str(folder / "cache")},
    }  # fmt: skip


def prepared(tree: dict[str, Any]) -> None:
    """Convert the rows once, so that workers find them."""
    _run_one(0, 1, tree, "", "", None, None, by_ddp=False)


def started(
    tree: dict[str, Any], folder: Path, num: int, fault: tuple[int, int, str] | None = None,
    kills: Sequence[tuple[int, int]] = (), by_ddp: bool = False,
) -> list[Any]:  # fmt: skip
    """Workers of one attempt, running. `fault` is (rank, number of a file operation, action)."""
    meeting = tempfile.mkdtemp()
    arguments = [
        (rank, num, tree, str(folder), meeting, fault if fault and fault[0] == rank else None)
        for rank in range(num)
    ]
    workers = [
        FORKED.Process(target=_run_one, args=(*one, list(kills)), kwargs={"by_ddp": by_ddp})
        for one in arguments
    ]
    for worker in workers:
        worker.start()
    return workers


def ended(workers: list[Any], seconds: float = PATIENCE_SECONDS) -> list[int]:
    """Exit codes, once one has failed or all have ended; those that are left are killed."""
    until = time.monotonic() + seconds
    while any(w.is_alive() for w in workers) and time.monotonic() < until:
        if any(w.exitcode for w in workers):
            time.sleep(0.2)
            break
        time.sleep(0.01)
    for worker in workers:
        if worker.is_alive():
            with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                os.kill(worker.pid, signal.SIGKILL)
        worker.join()
    return [worker.exitcode for worker in workers]


def attempt(*about: Any, **more: Any) -> list[int]:
    """Exit codes of the workers of one attempt."""
    return ended(started(*about, **more))


def completed(tree: dict[str, Any], folder: Path, num: int = 3, tries: int = 3) -> None:
    """Attempts without a fault until the run is done."""
    for _ in range(tries):
        if attempt(tree, folder, num) == [0] * num:
            return
    raise AssertionError(f"not done after {tries} attempts: {(folder / 'errors.txt').read_text()}")


def alone(tree: dict[str, Any], folder: Path) -> None:
    """The run, or the rest of it, by one worker in this process; the same bits are promised."""
    from pipeline.spec import load
    from pipeline.train.job import prepare as rows
    from pipeline.train.loop import train

    train(rows(load(tree), Path(), trusted_seconds=600), RunDir(folder), num_steps=STEPS)


def left(folder: Path) -> dict[str, Any]:
    """What is compared: every loss and metric, weights, and the last checkpoint's state."""
    from pipeline.rundir import checkpoint
    from pipeline.rundir.journal import Reader, curve_sha256
    from pipeline.rundir.records import Done

    run = RunDir(folder)
    points = list(Reader(run.journal).new())
    done = Done.read(run.done)
    state = {**checkpoint.load(run, run.saved_steps()[-1]), "seconds": None}
    train = [p for p in points if "train" in p]
    return {
        "steps": [p["step"] for p in train], "curve": curve_sha256(points),
        "gradients": [p["train"]["gradient_norm"] for p in train],
        "validation": [(p["step"], p["validation"]) for p in points if "validation" in p],
        "weights": done.weights_sha256, "difference": done.first_difference,
        "state": _text(state), "best": done.best, "test": done.test,
        "decision": done.decision,
    }  # fmt: skip


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_text, value)) + "]"
    return value.numpy().tobytes().hex() if hasattr(value, "numpy") else repr(value)


def fresh(folder: Path) -> Path:
    """An empty folder of that name."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _run_one(
    rank: int, num: int, tree: dict[str, Any], folder: str, meeting: str,
    fault: tuple[int, int, str] | None, kills: Any, by_ddp: bool,
) -> None:  # fmt: skip
    import torch
    import torch.distributed as dist

    now = time.time
    from pipeline.distributed import ordered
    from pipeline.spec import load
    from pipeline.train import fault_injection
    from pipeline.train.job import prepare as rows
    from pipeline.train.loop import train

    torch.set_num_threads(1)
    tree = dict(tree)
    pause, num_steps = tree.pop("pause", 0.0), tree.pop("num_steps", STEPS)
    seconds = tree.pop("clock", 0.0)
    clock: Any = patch("pipeline.rundir.journal.time.time", lambda: now() + seconds)
    job = rows(load(tree), Path(), trusted_seconds=600)
    if not folder:
        return
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if by_ddp:
        ordered.SMALL = 0
    place = Path(folder)
    watched: Any = contextlib.nullcontext()
    if fault is not None:
        watched = Disk(place, failing(fault[1], fault[2])).watching()
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}/meeting", rank=rank, world_size=num,
        timeout=timedelta(seconds=20),
    )  # fmt: skip
    try:
        strike = fault_injection.plan_faults(kills, RunDir(place), rank)

        def before(step: int) -> None:
            time.sleep(pause)  # for what happens beside training
            strike(step)

        with watched, clock:
            train(job, RunDir(place), before, num_steps, is_own_process=True)
    except BaseException as error:
        with (place / "errors.txt").open("a") as file:
            file.write(f"worker {rank}: {type(error).__name__}: {error}\n")
        os._exit(1)
    os._exit(0)
