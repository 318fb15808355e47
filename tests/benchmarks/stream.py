"""Rows per second of streamed rows, beside the same rows from the cache.

32 floats a row, Parquet files of 500 000 rows, on this disk and in an S3-compatible server on this
machine (SeaweedFS, which needs the cores too). Also: what is on the disk at most, and how long the
first batch takes when a run goes on early and late in an epoch.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.data import cache
from pipeline.data.loader import Loader, Partition
from pipeline.data.sampler import Sampler, WindowSampler, steps_per_epoch
from pipeline.data.streaming import Streamed
from pipeline.spec import Cache
from pipeline.spec.data import Data
from tests import s3
from tests.benchmarks.harness import Result

ROUNDS, NUM_ROWS = 1, 4_000_000
BATCH, COLUMNS, FILE_ROWS = 2048, 32, 500_000
STREAM = {"block_rows": FILE_ROWS // 2, "window": 2}
STREAMED = {"stream": STREAM}


def write(place: str, num_rows: int, filesystem: Any = None) -> None:
    """Parquet files below `place`, whose row groups are the blocks that will be asked for."""
    rng = np.random.default_rng(0)
    for start in range(0, num_rows, FILE_ROWS):
        x = rng.standard_normal((min(FILE_ROWS, num_rows - start), COLUMNS), dtype=np.float32)
        table = pa.table({f"x{k}": column for k, column in enumerate(x.T)} | {"y": x.sum(1)})
        pq.write_table(
            table, f"{place}/{start:09}.parquet", filesystem=filesystem,
            row_group_size=STREAM["block_rows"],
        )  # fmt: skip


def size_of(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measured(train: str, folder: Path, more: dict[str, Any]) -> Result:
    """The conversion, an epoch, the disk, and batches early and late."""
    begun = time.perf_counter()
    data = Data(train=train, target="y", **more)
    found = cache.load_or_convert(data, folder, {}, np.float32, Cache(folder=str(folder)))
    first, rows = time.perf_counter() - begun, found.train
    sampler: Any = Sampler(len(rows), BATCH, 0)
    if isinstance(rows, Streamed):
        sampler = WindowSampler(rows.bounds, BATCH, 0, rows.plan.window)
    steps, disk = steps_per_epoch(len(rows), BATCH), 0

    begun = time.perf_counter()
    with (
        rows.opened("epoch"),
        Loader(rows, sampler, lambda _: torch.zeros(1), range(steps), Partition()) as loader,
    ):
        for batch in loader:
            if batch.step % 100 == 0:
                disk = max(disk, size_of(folder))
    speed = len(rows) / (time.perf_counter() - begun)
    late = []
    for share_done in (0.01, 0.99):
        with rows.opened("resumed"):
            begun = time.perf_counter()
            rows.expect(sampler.blocks(int(steps * share_done)))
            rows.gather(sampler.rows(int(steps * share_done)))
            late.append(time.perf_counter() - begun)
    return {
        "rows": len(rows), "first_pass_seconds": first, "rows_per_second": speed,
        "disk_mib": disk >> 20, "first_batch_seconds_at_1_and_99_percent": late,
        "reads_per_row": rows.plan.reads_per_row if isinstance(rows, Streamed) else 1.0,
    }  # fmt: skip


def results(rounds: int, quick: bool) -> Iterator[Result]:
    """Rows from the cache, and streamed from this disk and from a server."""
    num_rows = 1_000_000 if quick else NUM_ROWS
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        (base / "rows").mkdir()
        write(str(base / "rows"), num_rows)
        yield {"case": "cached", **measured(str(base / "rows"), base / "a", {})}
        yield {"case": "streamed, disk", **measured(str(base / "rows"), base / "b", STREAMED)}
        if quick:
            return
        (base / "s3").mkdir()
        with s3.running(base / "s3") as server:
            write("rows/table", num_rows, server.filesystem)
            uri = server.uri("rows/table")
            yield {"case": "streamed, S3", **measured(uri, base / "c", STREAMED)}
