"""What a machine does while a worker trains, against what the system itself says."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import cast

import psutil
import pytest
import torch

from pipeline.rundir import RunDir, system
from pipeline.rundir.journal import format_line
from pipeline.rundir.records import Point, SystemReading
from pipeline.rundir.system import SystemReader
from pipeline.telemetry.system import SystemMonitor

CPU = torch.device("cpu")


def test_readings_are_the_systems(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with SystemMonitor(run, node=3, local_rank=0, device=CPU) as monitor:
        monitor.step = 7
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            hashlib.sha256(os.urandom(100_000))
    ((name, reading),) = SystemReader(run.system).new({})
    assert name == "node-3-worker-0.jsonl"
    assert (reading["node"], reading["step"]) == (3, 7)
    values = reading["values"]
    cpu = values["cpu_utilization_percentage"]
    assert cpu is not None
    assert 0.5 * 100 / (psutil.cpu_count() or 1) < cpu <= 100
    memory = psutil.virtual_memory()
    assert values["system_memory_usage_percentage"] == pytest.approx(memory.percent, abs=5)
    assert values["disk_usage_percentage"] == psutil.disk_usage(str(tmp_path)).percent
    assert all(value is not None and value >= 0 for value in values.values())


def test_other_workers_of_a_node_without_a_gpu_read_nothing(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with SystemMonitor(run, node=0, local_rank=1, device=CPU):
        pass
    assert not run.system.exists()


def test_a_full_disk_is_not_felt(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.system.mkdir()
    (run.system / "node-0-worker-0.jsonl").symlink_to("/dev/full")
    with SystemMonitor(run, node=0, local_rank=0, device=CPU):
        pass


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_workers_gpu_is_read(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with SystemMonitor(run, node=0, local_rank=1, device=torch.device("cuda")):
        time.sleep(0.2)
    ((_, reading),) = SystemReader(run.system).new({})
    names = {"utilization_percentage", "memory_usage_megabytes", "memory_usage_percentage",
             "power_usage_watts", "temperature_celsius"}  # fmt: skip
    assert set(reading["values"]) == {f"gpu_1_{name}" for name in names}


def a_reading(moment: int) -> SystemReading:
    return {"time": moment, "step": 1, "node": 0, "values": {"cpu": moment / 3}}


def test_a_reading_comes_once_whole_and_in_order(tmp_path: Path) -> None:
    one, other = tmp_path / "node-0-worker-0.jsonl", tmp_path / "node-1-worker-0.jsonl"
    for moment in (10, 20, 30):
        system.append(one, a_reading(moment))
    system.append(other, a_reading(15))
    reader = SystemReader(tmp_path)
    news = [(name, reading["time"]) for name, reading in reader.new({one.name: 20})]
    assert news == [(one.name, 30), (other.name, 15)]
    assert list(reader.new({})) == []
    line = format_line(cast(Point, a_reading(40)))
    with one.open("ab") as file:
        file.write(line[:20])
        file.flush()
        assert list(reader.new({})) == []
        file.write(line[20:])
        file.write(b'{"torn": 1}\n')
    assert [reading for _, reading in reader.new({})] == [a_reading(40)]
