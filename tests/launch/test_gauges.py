"""A run's gauges, as Prometheus reads them from a real node of Ray."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.launch.gauges import NAMES
from tests.conftest import Write
from tests.processes import free_port
from tests.ray_head import Head, running_head

pytestmark = pytest.mark.ray
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
        assert first.keys() == {f"ray_{name}" for name in NAMES}
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
    """All gauges of the run, once there is a checkpoint."""
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
        if any(name == "ray_pipeline_last_checkpoint_time" for name, _, _ in lines):
            assert all('job="small"' in tags and 'run="small-1"' in tags for _, tags, _ in lines)
            return {name: float(value) for name, _, value in lines}
        time.sleep(1)
