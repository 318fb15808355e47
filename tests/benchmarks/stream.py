"""Rows per second of streamed rows, beside the same rows from the cache.

    python -m tests.benchmarks.stream [MILLION_ROWS]

32 floats a row, Parquet files of 500 000 rows, on this disk and in an S3-compatible server on this
machine (SeaweedFS, which needs the cores too). Also: what is on the disk at most, and how long the
first batch takes when a run goes on early and late in an epoch.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.data import cache
from pipeline.data.loader import Loader, Partition
from pipeline.data.sampler import Sampler, WindowSampler, steps_per_epoch
from pipeline.data.stream import Streamed
from pipeline.dataspec import Data
from pipeline.spec import Cache
from tests import s3

BATCH, COLUMNS, FILE_ROWS = 2048, 32, 500_000
STREAM = {"block_rows": FILE_ROWS // 2, "window": 2}


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


def measured(train: str, folder: Path, more: dict[str, Any]) -> str:
    """One line: the conversion, an epoch, the disk, and batches early and late."""
    begun = time.perf_counter()
    data = Data(train=train, target="y", **more)
    found = cache.rows(data, folder, {}, np.float32, Cache(folder=str(folder)))
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
            late.append(f"{time.perf_counter() - begun:.2f} s at {share_done:.0%}")
    reads = ""
    if isinstance(rows, Streamed):
        reads = f", each row read {rows.plan.reads_per_row:.1f} times"
    return (
        f"first pass {first:.1f} s, {speed / 1e6:.2f} M rows/s, {disk >> 20} MiB on the disk"
        f"{reads}; first batch {', '.join(late)}"
    )


def main(million: float) -> None:
    """Print three lines."""
    num_rows = int(million * 1e6)
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        (base / "rows").mkdir()
        write(str(base / "rows"), num_rows)
        print(f"{num_rows:,} rows, {num_rows * (COLUMNS + 1) * 4 >> 20} MiB of float32")
        print("cached            ", measured(str(base / "rows"), base / "a", {}))
        print("streamed, disk    ", measured(str(base / "rows"), base / "b", {"stream": STREAM}))
        (base / "s3").mkdir()
        with s3.running(base / "s3") as server:
            write("rows/table", num_rows, server.filesystem)
            where = server.uri("rows/table")
            print("streamed, S3      ", measured(where, base / "c", {"stream": STREAM}))


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 4)
