"""Rows of five times the memory that the process may use: converted, then trained on.

The limit is a memory control group's, which counts the page cache too; this needs root on Linux.
Both figures are the group's own peak.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.benchmarks.harness import Result

ROUNDS, MIB = 1, 768
COLUMNS, STEPS, BATCH = 64, 100, 2048
VERSION_1, VERSION_2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


def write(folder: Path, num_rows: int) -> None:
    """Parquet files of float32 columns and a target."""
    rng, part = np.random.default_rng(0), 250_000
    for number, start in enumerate(range(0, num_rows, part)):
        x = rng.standard_normal((min(part, num_rows - start), COLUMNS), dtype=np.float32)
        table = pa.table({f"x{k}": column for k, column in enumerate(x.T)} | {"y": x.sum(1)})
        place = folder / f"{number:04}.parquet"
        pq.write_table(
            table, place, row_group_size=50_000, use_dictionary=False, compression="none"
        )


def job(folder: Path) -> Any:
    """The spec, over the files in `folder`."""
    from pipeline.spec import load

    return load(
        {
            "name": "memory", "data": {"train": str(folder / "*.parquet"), "target": "y"},
            "model": {"name": "mlp", "hidden": [64]}, "loss": "mse",
            "training": {"epochs": 1, "batch_size": BATCH},
        }
    )  # fmt: skip


def convert(folder: Path) -> str:
    """Into the cache."""
    from pipeline.train.job import prepare

    return f"{prepare(job(folder), Path()).num_rows:,} rows converted"


def train(folder: Path) -> str:
    """The first steps, and resuming late in the epoch beside resuming early."""
    from pipeline.data import cache
    from pipeline.rundir import RunDir
    from pipeline.train import loop
    from pipeline.train.job import prepare

    made = prepare(job(folder), Path(), trusted_seconds=cache.TRUSTED_SECONDS)
    place = folder / "run"
    place.mkdir()
    started = time.perf_counter()
    loop.train(made, RunDir(place), num_steps=STEPS)
    seconds = time.perf_counter() - started
    found = []
    for share in (0.01, 0.99):
        begun = time.perf_counter()
        rows = made.sampler().rows(int(share * made.steps_per_epoch))
        made.train.gather(rows)
        found.append(f"{time.perf_counter() - begun:.2f} s at {share:.0%}")
    return (
        f"{STEPS} steps, {STEPS * BATCH / seconds:,.0f} rows/s; "
        f"first batch of an epoch: {', '.join(found)}"
    )


def limited(work: Any, folder: Path, limit: int) -> tuple[str, int]:
    """What `work` said, and its peak in bytes, in a group of at most `limit` bytes."""
    is_first = VERSION_1.is_dir()
    group = (VERSION_1 if is_first else VERSION_2) / f"pipeline-benchmark-{os.getpid()}"
    group.mkdir()
    try:
        name = "memory.limit_in_bytes" if is_first else "memory.max"
        (group / name).write_text(str(limit))
        said: Any = multiprocessing.get_context("spawn").Queue()
        process = multiprocessing.get_context("spawn").Process(
            target=_inside, args=(work, folder, group, said)
        )
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"ended with {process.exitcode}: more than {limit >> 20} MiB?")
        peak = "memory.max_usage_in_bytes" if is_first else "memory.peak"
        return said.get(), int((group / peak).read_text())
    finally:
        group.rmdir()


def _inside(work: Any, folder: Path, group: Path, said: Any) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))
    said.put(work(folder))


def results(rounds: int, quick: bool) -> Iterator[Result]:
    """What was done, in how many seconds, and the peak; nothing where no group can be made."""
    mib = 512 if quick else MIB
    limit = mib << 20
    num_rows = (limit if quick else 5 * limit) // (4 * (COLUMNS + 1))
    if not os.access(VERSION_1 if VERSION_1.is_dir() else VERSION_2, os.W_OK):
        yield {"case": "not measured: memory control groups cannot be made here"}
        return
    with tempfile.TemporaryDirectory() as name:
        os.environ["PIPELINE_CACHE"] = f"{name}/cache"
        write(Path(name), num_rows)
        for work in (convert, train):
            started = time.perf_counter()
            text, peak = limited(work, Path(name), limit)
            yield {
                "case": work.__name__, "limit_mib": mib, "rows": num_rows, "told": text,
                "seconds": time.perf_counter() - started, "peak_mib": peak >> 20,
            }  # fmt: skip
