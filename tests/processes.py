"""Real processes for tests: gloo workers, Ray's, and a free port for a server."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

FORKED: Any = multiprocessing.get_context("forkserver")
"""Starts processes from a server that has imported everything: in a moment, with its environment
of the first start."""
FORKED.set_forkserver_preload(["pipeline.train.worker"])
os.environ["PIPELINE_STARTED_BY"] = str(os.getpid())
MARK = f"PIPELINE_STARTED_BY={os.getpid()}"
"""In the environment of all that this process starts: others on this machine are left alone."""
Work = Callable[[int, int], Any]


def on_workers(num_workers: int, work: Work) -> list[Any]:
    """What `work(rank, num_workers)` returned in each of `num_workers` gloo processes."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(
            _one, args=(num_workers, work, folder), nprocs=num_workers, start_method="forkserver"
        )  # type: ignore[no-untyped-call]
        return [
            torch.load(Path(folder) / f"{rank}.pt", weights_only=False)
            for rank in range(num_workers)
        ]


def _one(rank: int, num_workers: int, work: Work, folder: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_workers,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    try:
        torch.save(work(rank, num_workers), Path(folder) / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def free_port() -> int:
    """A port of the loopback interface that nothing listens on."""
    return free_ports(1)[0]


def free_ports(number: int) -> list[int]:
    """Different ports of the loopback interface that nothing listens on."""
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def ray_workers() -> list[int]:
    """Ids of the processes in which Ray's workers train that this process has started."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            is_own = MARK.encode() in (process / "environ").read_bytes().split(b"\0")
            if is_own and b"TrainWorker" in (process / "cmdline").read_bytes():
                found.append(int(process.name))
    return found
