"""Load of the machines while a run trains, read by a thread beside each worker that counts.

The first worker on each node reads its processors, memory, disk and network, and every worker its
GPU. Names are those that MLflow gives the same numbers, but for rates.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from typing import Self

import psutil
import torch

from pipeline.rundir import RunDir, system
from pipeline.rundir.records import Numbers
from pipeline.telemetry.cadence import Cadence

MEGABYTE = 1e6
LEAST_SECONDS = 0.5
"""In which there is enough to count, at the end of a run."""


class SystemMonitor:
    """Writes readings to the run's folder until it is left; `step` is told by the worker."""

    def __init__(self, run: RunDir, node: int, local_rank: int, device: torch.device) -> None:
        """`local_rank` is the worker's index on its node."""
        self.step = 0
        """Steps that are done."""
        self._node = node
        self._path = run.system / f"node-{node}-worker-{local_rank}.jsonl"
        self._run, self._local_rank, self._device = run, local_rank, device
        self._has_readings = local_rank == 0 or device.type == "cuda"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Self:
        if self._has_readings:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._has_readings:
            self._stop.set()
            self._thread.join()

    def _follow(self) -> None:
        # a machine without such counters, a full disk, a driver that fails: training goes on
        with contextlib.suppress(Exception):
            self._path.parent.mkdir(exist_ok=True)
            sources: list[NodeLoad | GpuLoad] = []  # made here: psutil counts by thread
            if self._local_rank == 0:
                sources.append(NodeLoad(self._run))
            if self._device.type == "cuda":
                sources.append(GpuLoad(self._device, self._local_rank))
            self._read_on(sources)

    def _read_on(self, sources: Sequence[NodeLoad | GpuLoad]) -> None:
        cadence, has_read = Cadence(), False
        while True:
            is_last = cadence.wait(self._stop)
            if is_last and has_read and cadence.passed < LEAST_SECONDS:
                return
            cadence.look()
            with contextlib.suppress(OSError):  # a full disk: training says so itself
                self._write(sources)
            has_read = True
            if is_last:
                return

    def _write(self, sources: Sequence[NodeLoad | GpuLoad]) -> None:
        values: Numbers = {}
        for source in sources:
            values |= source.read()
        now = int(1000 * time.time())
        system.append(
            self._path, {"time": now, "step": self.step, "node": self._node, "values": values}
        )


class NodeLoad:
    """What all processes of this machine use, and rates since the last reading."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        psutil.cpu_percent()  # from here on
        self._before = self._count()

    def _count(self) -> dict[str, float]:
        """Seconds, and bytes that went over network and disks, since some time in the past."""
        counts = {"seconds": time.monotonic()}
        if network := psutil.net_io_counters():
            counts |= {
                "network_receive": network.bytes_recv,
                "network_transmit": network.bytes_sent,
            }
        if disk := psutil.disk_io_counters():
            counts["disk_read"], counts["disk_write"] = disk.read_bytes, disk.write_bytes
        return counts

    def read(self) -> Numbers:
        """Percentages, megabytes, and megabytes per second."""
        memory = psutil.virtual_memory()
        disk = psutil.disk_usage(str(self._run.path))
        before, self._before = self._before, self._count()
        seconds = self._before["seconds"] - before["seconds"]
        rates = {
            f"{name}_megabytes_per_second": (now - before[name]) / seconds / MEGABYTE
            for name, now in self._before.items()
            if name != "seconds" and name in before
        }
        return {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / MEGABYTE,
            "system_memory_usage_percentage": memory.percent,
            "disk_usage_megabytes": disk.used / MEGABYTE,
            "disk_usage_percentage": disk.percent,
            **rates,
        }


class GpuLoad:
    """What one GPU does, whoever uses it."""

    def __init__(self, device: torch.device, index: int) -> None:
        self._device, self._prefix = device, f"gpu_{index}_"

    def read(self) -> Numbers:
        """Percentages, megabytes, watts and degrees; what its driver does not say is left out."""
        free, total = torch.cuda.mem_get_info(self._device)
        values: Numbers = {
            "memory_usage_megabytes": (total - free) / MEGABYTE,
            "memory_usage_percentage": 100 * (total - free) / total,
        }
        # NVML may be missing, or know no such number: each has an error of its own for that
        with contextlib.suppress(Exception):
            values["utilization_percentage"] = torch.cuda.utilization(self._device)
        with contextlib.suppress(Exception):
            values["power_usage_watts"] = torch.cuda.power_draw(self._device) / 1000
        with contextlib.suppress(Exception):
            values["temperature_celsius"] = torch.cuda.temperature(self._device)
        return {self._prefix + name: value for name, value in values.items()}
