"""Rows per second of the loader alone, beside tensors in memory and beside Ray Data.

Ours: batches in full shuffle from the mapped cache, through the thread and buffers that training
has. In memory: the tensors of all rows, indexed by a permutation. Ray Data: the same Parquet file
through `iter_torch_batches` with a local shuffle of ten batches. In turns, one thread each.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.data import cache
from pipeline.data.batch import Batch
from pipeline.data.dataset import Dataset
from pipeline.data.loader import Loader, Partition
from pipeline.data.sampler import Sampler, steps_per_epoch
from pipeline.spec import Cache
from pipeline.spec.data import Data
from tests.benchmarks.harness import Result, take_turns

ROUNDS = 3
RNG = np.random.default_rng(0)


def floats() -> tuple[pa.Table, int]:
    """One million rows of 32 floats."""
    x = RNG.standard_normal((1_000_000, 32), dtype=np.float32)
    return pa.table({f"x{number}": column for number, column in enumerate(x.T)}), 2048


def images() -> tuple[pa.Table, int]:
    """60 000 images of 28 x 28."""
    pixels = RNG.standard_normal((60_000, 28, 28), dtype=np.float32)
    return pa.table({"image": pa.FixedShapeTensorArray.from_numpy_ndarray(pixels)}), 256


def tokens() -> tuple[pa.Table, int]:
    """100 000 lists of 1 to 128 tokens."""
    lengths = RNG.integers(1, 129, 100_000)
    values = pa.array(RNG.integers(0, 30_000, lengths.sum()))
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    return pa.table({"tokens": pa.ListArray.from_arrays(offsets, values)}), 256


def of_loader(rows: Dataset, batch: int) -> int:
    """One epoch of the loader; how many rows came."""
    steps = steps_per_epoch(len(rows), batch)
    sampler = Sampler(len(rows), batch, 0)
    found = 0
    with Loader(rows, sampler, lambda batch: torch.zeros(1), range(steps), Partition()) as loader:
        for one in loader:
            for _, columns in one.microbatches:
                next(iter(columns.values()))
                found += one.num_rows
    return found


def whole(rows: Dataset, batch: int) -> Callable[[], int]:
    """One epoch over tensors in memory: indexing, and for lists padding of slices."""
    everything: Batch = rows.gather(np.arange(min(len(rows), 1_000_000)))
    if rows.lists:
        (lists,) = rows.lists.values()
        cuts = np.split(np.asarray(lists.values, np.int64), lists.offsets[1:-1])
        pieces = [torch.from_numpy(part) for part in cuts]

        def padded() -> int:
            found = 0
            for chosen in torch.split(torch.randperm(len(pieces)), batch):
                picked = [pieces[number] for number in chosen.tolist()]
                found += len(torch.nn.utils.rnn.pad_sequence(picked, batch_first=True))
            return found

        return padded
    block = everything.matrices[0].clone()  # type: ignore[attr-defined]

    def indexed() -> int:
        found = 0
        for chosen in torch.split(torch.randperm(len(block)), batch):
            found += len(block[chosen])
        return found

    return indexed


def of_ray_data(path: Path, batch: int) -> int:
    """One epoch of Ray Data; how many rows came."""
    import ray.data

    data = ray.data.read_parquet(str(path))
    options: dict[str, Any] = {"batch_size": batch, "local_shuffle_buffer_size": 10 * batch}
    if pa.types.is_list(pq.read_schema(path).field(0).type):  # which it does not pad
        batches = data.iter_batches(batch_format="numpy", **options)
    else:
        batches = data.iter_torch_batches(**options)
    return sum(len(next(iter(found.values()))) for found in batches)


def speed(epoch: Callable[[], int]) -> float:
    """Rows per second of one epoch."""
    started = time.perf_counter()
    return epoch() / (time.perf_counter() - started)


def results(rounds: int, quick: bool) -> Iterator[Result]:
    """Medians of rows per second, and seconds to convert and to find again."""
    import logging

    import ray

    torch.set_num_threads(1)
    ray.init(num_cpus=2, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    with tempfile.TemporaryDirectory() as name:
        os.environ["PIPELINE_CACHE"] = name
        for make in (tokens,) if quick else (floats, images, tokens):
            table, batch = make()
            path = Path(name) / f"{make.__name__}.parquet"
            pq.write_table(table, path)
            started = time.perf_counter()
            read = partial(
                cache.load_or_convert, Data(train=str(path)), Path(), {}, np.float32, Cache()
            )
            rows = read().train
            cold, started = time.perf_counter() - started, time.perf_counter()
            read()
            warm = time.perf_counter() - started
            epochs: dict[str, Callable[[], int]] = {
                "loader": partial(of_loader, rows, batch), "in_memory": whole(rows, batch),
                "ray_data": partial(of_ray_data, path, batch),
            }  # fmt: skip
            speeds = take_turns({n: partial(speed, epoch) for n, epoch in epochs.items()}, rounds)
            yield {
                "case": make.__doc__, **{n: median(values) for n, values in speeds.items()},
                "convert_seconds": cold, "found_again_seconds": warm,
            }  # fmt: skip
    ray.shutdown()
