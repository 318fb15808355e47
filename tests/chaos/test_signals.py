"""Told to end at any moment: no step is lost, and the run resumes with the same bits."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest

import pipeline
from pipeline.rundir.journal import Reader
from pipeline.rundir.records import Ended
from tests.conftest import Write

ALL = (pytest.mark.chaos, pytest.mark.timeout(3600))
GRACE_SECONDS = 3.0
"""What `ray job stop` gives between SIGTERM and SIGKILL."""


@pytest.mark.parametrize(
    "times", [pytest.param(20, marks=ALL, id="all"), pytest.param(3, id="some")]
)
def test_whoever_tells_it_to_end_loses_no_step(job: Write, tmp_path: Path, times: int) -> None:
    training = {"epochs": 200 * max(times, 5), "batch_size": 6, "microbatch_size": 2}
    path = job({"model": {"name": "mlp", "hidden": [8], "dropout": 0.1}, "training": training,
                "checkpoint.every_steps": 100_000})  # fmt: skip
    alone = pipeline.run(path, {"storage": str(tmp_path / "alone")})
    folder, drawn = tmp_path / "runs" / "small-1", random.Random(0)
    for number in range(times):
        told = (signal.SIGTERM, signal.SIGINT)[number % 2]
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", "run", str(path)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        reader, deadline = Reader(folder / "curve.jsonl"), time.monotonic() + 120
        list(reader.new())
        if number % 5:  # else while it starts
            while not list(reader.new()) and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        time.sleep(drawn.random() / 2)
        process.send_signal(told)
        try:
            _, err = process.communicate(timeout=GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            _, err = process.communicate()
        steps = [p["step"] for p in Reader(folder / "curve.jsonl").new() if "train" in p]
        saved = [int(p.name[5:]) for p in (folder / "checkpoints").glob("step-*")]
        assert max(steps, default=0) == max(saved, default=0), f"{number}: {err}"
    result = pipeline.run(path)
    assert result.curve_sha256 == alone.curve_sha256
    assert result.weights_sha256 == alone.weights_sha256
    assert result.metrics == alone.metrics
    record = json.loads((folder / "recorded.json").read_text())
    client = mlflow.MlflowClient(record["tracking_uri"])
    (run,) = client.search_runs([record["experiment_id"]])
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == list(enumerate(alone.losses, start=1))


@pytest.mark.ray
@pytest.mark.parametrize(
    ("told", "seconds"),
    [
        (signal.SIGTERM, 4.0),
        (signal.SIGINT, 7.0),
        *(pytest.param(signal.SIGINT, s, marks=pytest.mark.chaos) for s in (4.0, 10.0)),
        *(pytest.param(signal.SIGTERM, s, marks=pytest.mark.chaos) for s in (7.0, 10.0)),
    ],
)
def test_signals_while_ray_starts_end_the_command(
    job: Write, tmp_path: Path, told: signal.Signals, seconds: float
) -> None:
    path = job({"training.epochs": 100_000, "workers.num": 2})
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "run", str(path)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    time.sleep(seconds)
    os.killpg(process.pid, told)
    try:
        _, err = process.communicate(timeout=240)
    finally:  # it would train for hours
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode != -told:  # else it had not even read the spec
        assert process.returncode == 128 + told, err
        assert "stopped" in err
    assert "Traceback" not in err
    assert "ERROR" not in err
    for ended in tmp_path.glob("runs/*/ended.json"):
        assert Ended.read(ended).state == "killed"
