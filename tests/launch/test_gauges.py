"""A run's gauges, as Prometheus reads them from a real node of Ray."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.launch.gauges import NAMES, Gauges
from pipeline.rundir import RunDir
from tests.conftest import Write
from tests.processes import free_port
from tests.ray_head import Head, running_head

SECONDS = 120


@pytest.fixture
def metrics_port() -> int:
    return free_port()


@pytest.fixture
def head(tmp_path: Path, metrics_port: int) -> Iterator[Head]:
    (tmp_path / "home").mkdir()
    options = [f"--metrics-export-port={metrics_port}"]
    with running_head(tmp_path / "home", options=options) as head:
        yield head


@pytest.mark.ray
def test_a_runs_gauges_are_beside_rays_own(
    head: Head, metrics_port: int, job: Write, tmp_path: Path
) -> None:
    path = job({"training.epochs": 100_000, "workers.num": 2, "checkpoint.every_steps": 20})
    words = [sys.executable, "-m", "pipeline", "run", str(path), "--set", f"storage={tmp_path}/r"]
    process = subprocess.Popen(
        words, env=head.environment | {"RAY_ADDRESS": head.gcs}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        first = _told(metrics_port, process)
        curve = (tmp_path / "r/small-1/curve.jsonl").read_text().splitlines()
        last = max(json.loads(line)["step"] for line in curve[:-1])
        assert 0 < first["ray_pipeline_step"] <= last
        assert first["ray_pipeline_num_steps"] == 300_000
        assert first["ray_pipeline_attempts"] == 1
        assert first["ray_pipeline_rows_per_second"] > 0
        for name in ("ray_pipeline_last_step_time", "ray_pipeline_last_checkpoint_time"):
            assert 0 <= time.time() - first[name] < SECONDS
    finally:
        process.kill()
        process.wait()


def _told(port: int, process: subprocess.Popen[str]) -> dict[str, float]:
    """The gauges of the run, once there are all."""
    deadline = time.monotonic() + SECONDS
    while True:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                text = answer.read().decode()
        except OSError:
            text = ""
        lines = re.findall(r"^(ray_pipeline_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE)
        if {name for name, _, _ in lines} == {f"ray_{name}" for name in NAMES}:
            assert all('job="small"' in tags and 'run="small-1"' in tags for _, tags, _ in lines)
            return {name: float(value) for name, _, value in lines}
        time.sleep(1)


def test_what_gauges_tell_of_a_curve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without Ray: its gauges are stood in for by what they are set to."""
    values: dict[str, float] = {}

    class Gauge:
        def __init__(self, name: str, **_: object) -> None:
            self.name = name

        def set_default_tags(self, tags: dict[str, str]) -> None:
            assert tags == {"job": "small", "run": "small-1"}

        def set(self, value: float) -> None:
            values[self.name] = value

    now = 1000.0
    monkeypatch.setattr("ray.util.metrics.Gauge", Gauge)
    monkeypatch.setattr(time, "time", lambda: now)
    run = RunDir(tmp_path / "small-1")
    run.checkpoints.mkdir(parents=True)
    gauges = Gauges(run, "small", num_steps=90, rows_per_step=8)
    gauges.publish()
    at_start = {"num_steps": 90, "reached_step": 0, "last_step_time": 1000}
    at_start["last_checkpoint_time"] = 1000
    assert values == {f"pipeline_{name}": value for name, value in at_start.items()}
    now += 2
    start: Any = {"event": "start", "attempt": 3, "step": 0}
    gauges.observe(start)
    for step, loss in ((5, 0.5), (6, None), (4, 0.25)):  # set back by a restart
        point: Any = {"step": step, "time": 1001_000, "train": {"loss": loss}}
        gauges.observe(point)
        if loss is None:
            gauges.publish()
            assert math.isnan(values["pipeline_loss"])
    now += 2
    gauges.publish()
    assert values["pipeline_loss"] == 0.25
    assert (values["pipeline_step"], values["pipeline_reached_step"]) == (4, 6)
    assert (values["pipeline_attempts"], values["pipeline_last_step_time"]) == (3, 1001)
    (run.checkpoints / "step-4").mkdir()
    now += 2
    gauges.publish()
    assert values["pipeline_last_checkpoint_time"] == (run.checkpoints / "step-4").stat().st_mtime
