"""What a pod's hook does to the command that trains in it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.conftest import Write

MAX_SECONDS = 120


def test_the_command_of_its_folder_saves_its_state_and_others_go_on(
    job: Write, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    path = str(job({"training.epochs": 100_000}))
    words = [sys.executable, "-m", "pipeline", "run", path, "--json"]
    ours = subprocess.Popen(
        [*words, "--set", "storage=runs"], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    others = subprocess.Popen([*words, "--set", "storage=runs"], cwd=tmp_path / "other")
    try:
        _await_curve(tmp_path / "runs")
        _await_curve(tmp_path / "other/runs")
        hook = [sys.executable, "-m", "pipeline.kubernetes.pre_stop", str(MAX_SECONDS)]
        subprocess.run(hook, cwd=tmp_path, check=True, timeout=MAX_SECONDS)
        out, _ = ours.communicate(timeout=10)
        assert ours.returncode == 128 + signal.SIGTERM
        assert json.loads(out.splitlines()[-1])["state"] == "stopped"
        assert list((tmp_path / "runs").glob("*/checkpoints/*"))
        assert others.poll() is None
    finally:
        for process in (ours, others):
            process.kill()
            process.wait()


def _await_curve(storage: Path) -> None:
    deadline = time.monotonic() + MAX_SECONDS
    while not any(path.stat().st_size for path in storage.glob("*/curve.jsonl")):
        assert time.monotonic() < deadline, "it does not train"
        time.sleep(0.1)
