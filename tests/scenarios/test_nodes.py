"""Two real nodes, of which one lacks the storage, is drained, or is taken away."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import pipeline
from pipeline.rundir import RunDir
from tests.approved import approve
from tests.conftest import happened, rows
from tests.ray_head import Head, Network, own_network, running_head, running_node
from tests.scenarios.test_messages import MESSAGES

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(
        os.geteuid() != 0 or not shutil.which("ip"), reason="makes a network, as root with `ip`"
    ),
]
JOB = """
name: two
data: {train: rows.csv, validation: 0.2, inputs: [a, b], target: y}
model: {name: mlp, hidden: [16]}
loss: mse
training: {epochs: 1500, batch_size: 8, microbatch_size: 4}
workers: {num: 2, placement: strict_spread}
"""


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with own_network() as network:
        yield network


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory, network: Network) -> Iterator[Head]:
    with running_head(tmp_path_factory.mktemp("home"), network=network) as head:
        yield head


def started(head: Head, job: Path, *words: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", "run", str(job), *map(str, words)],
        env={**head.environment, "RAY_ADDRESS": head.gcs}, cwd=job.parent, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture
def job(tmp_path: Path) -> Path:
    (tmp_path / "rows.csv").write_text(rows())
    (tmp_path / "job.yaml").write_text(JOB)
    return tmp_path / "job.yaml"


@pytest.mark.parametrize("hidden", ["runs", "data"])
def test_what_a_node_lacks_is_told_in_one_message(
    hidden: str, head: Head, network: Network, job: Path, tmp_path: Path
) -> None:
    for name in ("runs", "data"):
        (tmp_path / name).mkdir()
    shutil.move(tmp_path / "rows.csv", tmp_path / "data" / "rows.csv")
    with running_node(head, f"mount -t tmpfs none {tmp_path / hidden}", network=network):
        process = started(head, job, "--set", "data.train=data/rows.csv")
        _, err = process.communicate(timeout=240)
    approve(MESSAGES / f"node_without_{hidden}.txt", err.replace(str(tmp_path), "FOLDER"))
    assert process.returncode == (1 if hidden == "runs" else 2)


def test_before_a_node_leaves_the_state_is_saved_and_that_is_told_once(
    head: Head, network: Network, job: Path, tmp_path: Path
) -> None:
    changes = {"workers": {"num": 1}, "storage": str(tmp_path / "alone")}
    alone = pipeline.run(str(job), changes)
    with running_node(head, network=network) as second:
        process = started(
            head, job, "--json", "--set", "workers={min: 1, max: 2, placement: spread}"
        )
        folder = tmp_path / "runs" / "two-1"
        deadline = time.monotonic() + 120
        while not (folder / "curve.jsonl").exists() or not happened(folder, "start"):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        second.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["weights_sha256"] == alone.weights_sha256
    assert result["curve_sha256"] == alone.curve_sha256
    assert [event["workers"] for event in happened(folder, "start")] == [2, 2]
    told = happened(RunDir(folder).path, "nodes")
    assert len(told) == 1
    assert " leaves the cluster in " in told[0]["text"]
    assert err.count("leaves the cluster") == 1
    approve(
        MESSAGES / "drained_node.txt", err.partition("done  ")[0].replace(str(tmp_path), "FOLDER")
    )


PLACED = """
import ray

import pipeline

print("imported on node", ray.util.get_node_ip_address(), flush=True)


@pipeline.losses.register("placed")
def placed(prediction, target):
    return (prediction - target) ** 2
"""


@pytest.mark.chaos  # two minutes
def test_workers_stand_on_nodes_with_their_label_and_gpu(
    head: Head, network: Network, job: Path, tmp_path: Path
) -> None:
    (tmp_path / "placed.py").write_text(PLACED)
    accelerator = json.dumps({"accelerator_type:A100": 1})
    options = ["--labels=zone=b", "--num-gpus=2", f"--resources={accelerator}"]
    with running_node(head, network=network, options=options):
        words = ["--set", "training.epochs=1", "--set", "loss=placed", "--import"]
        words += [str(tmp_path / "placed.py"), "--fresh", "--set"]
        process = started(head, job, *words, "workers={num: 2, labels: {zone: b}}")
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        outputs = sorted((tmp_path / "runs" / "two-1" / "output").glob("*.txt"))
        assert len(outputs) == 2
        for output in outputs:
            assert f"imported on node {network.there}\n" in output.read_text()
        process = started(head, job, *words, "workers={num: 2, gpu: true, accelerator: A100}")
        _, err = process.communicate(timeout=240)
        assert process.returncode == 2, err
        torch_version = version("torch")
        assert f"workers.gpu: torch {torch_version} on node {network.there}, built without" in err
