"""What a worker does at 64, 512 and 4096 workers, 1e9 rows, 1e6 steps and many parameters.

Each piece of its work runs here for itself, at full size: only what the network carries is given in
bytes. Then small steps on real gloo workers, many more than there are cores, by their CPU time.
"""

from __future__ import annotations

import pickle
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data.batch import Batch
from pipeline.data.partition import subtrees, worker_range
from pipeline.data.sampler import Sampler
from pipeline.distributed import comm, ordered
from pipeline.distributed.seeds import Seeds
from pipeline.losses.objective import Objective
from pipeline.rundir import RunDir, checkpoint
from pipeline.rundir.checkpoint import Checkpoints
from pipeline.rundir.journal import Journal, Reader, events
from pipeline.rundir.records import Identity, Numbers
from pipeline.rundir.repair import repair
from pipeline.spec.sections import Checkpoint
from pipeline.train.determinism import deterministic
from pipeline.train.nodes import Answer
from pipeline.train.step import train_step
from tests.batches import step_batch
from tests.benchmarks.harness import Result
from tests.benchmarks.same_bits import mlp_objective

ROUNDS, REPEATS = 1, 5
WORKERS, BILLION, ROWS_EACH = (1, 64, 512, 4096), 10**9, 16
"""A global batch has `ROWS_EACH` rows, one micro-batch, for each worker."""
CPU = torch.device("cpu")


def seconds(work: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Of the quickest of some tries, after a first one."""
    found = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return min(found[1:])


def order(num_workers: int) -> Result:
    """The rows of a step, of a billion: any step, whatever was asked for before."""
    size = ROWS_EACH * num_workers
    steps = iter(np.random.default_rng(0).integers(0, BILLION // size, 100).tolist())
    sampler = Sampler(BILLION, size, seed=0)
    return {"ms": 1e3 * seconds(lambda: sampler.rows(next(steps)))}


def cuts(num_workers: int) -> Result:
    """Which micro-batches are whose: once a run, and again for the last batch of an epoch."""

    def cut() -> None:
        subtrees.cache_clear()
        subtrees(num_workers, num_workers)

    return {"ms": 1e3 * seconds(cut)}


def message(num_workers: int) -> Result:
    """Losses, requests and counts beside the gradients, of two losses: float64."""
    return {"kB": num_workers * (2 + 2 + 2) * 8 / 1e3}


def start(num_workers: int) -> Result:
    """What every worker says of its node, read by every worker."""
    answer = Answer("f" * 56, "10.100.100.100", "", False)
    each = pickle.dumps(answer)

    def read() -> None:
        for _ in range(num_workers):
            pickle.loads(each)

    return {"kB": len(each) * num_workers / 1e3, "ms": 1e3 * seconds(read)}


def tree(num_workers: int, num_parameters: int) -> Result:
    """The sums of one step's exchange that a worker makes, and what it sends."""
    objective = Objective(nn.Linear(num_parameters // 2, 2, bias=False), [], [], {})
    gradients = ordered.OrderedGradients(objective, Seeds(0, CPU))
    gradients.num_workers = gradients._num_microbatches = num_workers
    numbers = torch.zeros(6 * num_workers, dtype=torch.float64)

    def received(out: Tensor, own: Tensor) -> None:
        """The network's part."""

    with (
        mock.patch.object(ordered, "_all_gather", received),
        mock.patch.object(torch.distributed, "all_to_all_single", received),
    ):
        found = seconds(lambda: gradients._exchange(numbers), 3)
    sent = 2 * gradients.size * 4 * (num_workers - 1) / num_workers
    return {"ms": 1e3 * found, "MB": sent / 1e6}


def state(num_parameters: int) -> Result:
    """A checkpoint with Adam's moments: copied, written beside training, checked, loaded."""
    weights = torch.rand(num_parameters)
    moments = {0: {"exp_avg": weights.clone(), "exp_avg_sq": weights.clone()}}
    snapshot = {"weights": {"w": weights}, "optimizer": {"state": moments}}
    identity = Identity(spec="", data="", bits={})
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir(Path(folder) / "run")
        run.checkpoints.mkdir(parents=True)
        saved = Checkpoints(run, Checkpoint(), identity)
        saved._is_first = False  # which is read back
        started = time.perf_counter()
        saved.save(1, snapshot, lambda: None)
        saved.wait()
        written = time.perf_counter()
        checkpoint.newest(run, identity)
        checked = time.perf_counter()
        checkpoint.load(run, 1)
        loaded = time.perf_counter()
    return {
        "GB": 12 * num_parameters / 1e9, "copy_s": seconds(weights.clone, 1) * 3,
        "write_s": written - started, "check_s": checked - written, "load_s": loaded - checked,
    }  # fmt: skip


def curve(num_steps: int) -> Result:
    """The journal of many steps: a point written, all read twice at a start, events read."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "curve.jsonl"
        journal = Journal(path)
        train: Numbers = {"loss": 0.123456789, "learning_rate": 1e-3, "gradient_norm": 1.23456789}
        started = time.perf_counter()
        for step in range(1, num_steps + 1):
            journal.write({"step": step, "epoch": step / 7, "terms": {"mse": 0.1}, "train": train})
        journal.close()
        written = time.perf_counter()
        repair(path)
        repaired = time.perf_counter()
        Journal(path, step=num_steps).close()
        opened = time.perf_counter()
        reader = Reader(path, only_events=True)
        list(events(reader))
        return {
            "MB": path.stat().st_size / 1e6, "write_us": 1e6 * (written - started) / num_steps,
            "repair_s": repaired - written, "open_s": opened - repaired,
             "events_s": time.perf_counter() - opened,
        }  # fmt: skip


def real_steps(num_steps: int, rank: int, num: int) -> float:
    """CPU seconds of a step, on a worker among others, of 10 000 parameters."""
    objective = mlp_objective(64)
    gradients = ordered.OrderedGradients(objective, Seeds(0, CPU))
    optimizer = torch.optim.AdamW(objective.parameters())
    own: list[tuple[int, Batch]] = [
        (i, {"features": torch.randn(ROWS_EACH, 32), "y": torch.randn(ROWS_EACH)})
        for i in worker_range(num, rank, num)
    ]
    with deterministic(True):
        for step in range(num_steps + 1):
            if step == 1:
                comm.barrier()
                started = time.process_time()
            train_step(objective, optimizer, gradients, step_batch(objective, own, num, step))
    return (time.process_time() - started) / num_steps


def results(rounds: int, quick: bool) -> Iterator[Result]:
    """Each piece at each size."""
    from tests.processes import on_workers

    for piece in (order, cuts, message, start):
        for num in WORKERS:
            yield {"case": piece.__name__, "workers": num, **piece(num)}
    for parameters in (10**5,) if quick else (10**6, 10**8):
        for num in WORKERS[1:]:
            case = f"tree of {parameters:,} parameters"
            yield {"case": case, "workers": num, **tree(num, parameters)}
    for parameters in (10**5,) if quick else (10**7, 10**8):
        yield {"case": f"state of {parameters:,} parameters", **state(parameters)}
    for steps in (10**3,) if quick else (10**4, 10**5, 10**6):
        yield {"case": f"curve of {steps:,} steps", **curve(steps)}
    for num in (2,) if quick else (2, 8, 32, 64):
        found = on_workers(num, partial(real_steps, 2 if quick else 20))
        yield {"case": "real steps", "workers": num, "cpu_ms": 1e3 * max(found)}
