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
    ((name, _, reading),) = SystemReader(run.system, {}).new()
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
    ((*_, reading),) = SystemReader(run.system, {}).new()
    names = {"utilization_percentage", "memory_usage_megabytes", "memory_usage_percentage",
             "power_usage_watts", "temperature_celsius"}  # fmt: skip
    assert set(reading["values"]) == {f"gpu_1_{name}" for name in names}


def a_reading(moment: int) -> SystemReading:
    return {"time": moment, "step": 1, "node": 0, "values": {"cpu": moment / 3}}


def test_a_reading_comes_once_whole_and_in_order(tmp_path: Path) -> None:
    one, other = tmp_path / "node-0-worker-0.jsonl", tmp_path / "node-1-worker-0.jsonl"
    moments = [10, 20, 3_600_000, 30]  # the clock was set back
    for moment in moments:
        system.append(one, a_reading(moment))
    system.append(other, a_reading(15))
    reader = SystemReader(tmp_path, {})
    found = list(reader.new())
    assert [(name, reading["time"]) for name, _, reading in found] == [
        *((one.name, moment) for moment in moments), (other.name, 15),
    ]  # fmt: skip
    assert list(reader.new()) == []
    again = SystemReader(tmp_path, {one.name: found[1][1], other.name: found[-1][1]})
    assert [reading["time"] for *_, reading in again.new()] == moments[2:]
    line = format_line(cast(Point, a_reading(40)))
    with one.open("ab") as file:
        file.write(line[:20])
        file.flush()
        assert list(reader.new()) == []
        file.write(line[20:])
    assert [reading for *_, reading in reader.new()] == [a_reading(40)]


@pytest.mark.parametrize(
    "odd",
    [
        b'{"torn": 1', b"\xff\n", format_line(cast(Point, {"step": 1})),
        format_line(cast(Point, {**a_reading(1), "values": {"cpu": "much"}})),
        format_line(cast(Point, {**a_reading(1), "values": 3})),
    ],
    ids=["torn", "no text", "no time", "text", "no values"],
)  # fmt: skip
def test_a_line_that_is_no_reading_is_left_out_alone(odd: bytes, tmp_path: Path) -> None:
    path = tmp_path / "node-0-worker-0.jsonl"
    system.append(path, a_reading(10))
    with path.open("ab") as file:
        file.write(odd)
    for moment in (20, 30):
        system.append(path, a_reading(moment))
    found = [reading["time"] for *_, reading in SystemReader(tmp_path, {}).new()]
    assert found == [10, 20, 30]


def test_a_machine_without_counters_is_no_reason_not_to_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise NotImplementedError

    monkeypatch.setattr(psutil, "disk_io_counters", fail)
    with SystemMonitor(RunDir(tmp_path), node=0, local_rank=0, device=CPU):
        pass
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "system").touch()
    with SystemMonitor(RunDir(tmp_path / "file"), node=0, local_rank=0, device=CPU):
        pass


def test_the_last_reading_is_not_of_a_moment(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with SystemMonitor(run, node=0, local_rank=0, device=CPU):
        time.sleep(1.2)
    assert len(list(SystemReader(run.system, {}).new())) == 1
