"""What a person reads when something fails on a cluster: compared with approved texts."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.approved import approve
from tests.clusters import until
from tests.conftest import rows
from tests.ray_head import Head

pytestmark = pytest.mark.ray
MESSAGES = Path(__file__).parent / "messages"
JOB = """
name: job
data: {train: rows.csv, validation: 0.2, inputs: [a, b], target: y}
model: {name: mlp, hidden: [16]}
loss: mse
training: {epochs: 2, batch_size: 8, microbatch_size: 4}
workers: {num: 2}
"""
BROKEN = '''"""A loss that fails, and one whose worker is killed, once."""

import os
import signal
import time
from pathlib import Path

import torch

import pipeline

CALLS = []


@pipeline.losses.register("broken")
def broken(prediction, target):
    """Fails while it trains."""
    if torch.is_grad_enabled() and is_first_worker():
        return prediction[:, 0] - target
    return (prediction - target) ** 2


@pipeline.losses.register("killed")
def killed(prediction, target, *, once: str):
    """Kills its worker after some steps, and makes the file `once`."""
    CALLS.append(1)
    if not is_first_worker() or Path(once).exists():
        return (prediction - target) ** 2
    if len(CALLS) > 300:  # so that steps are in the curve
        time.sleep(0.3)
    if len(CALLS) > 305:
        Path(once).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return (prediction - target) ** 2


def is_first_worker():
    """Not so in a check, which has no workers."""
    return torch.distributed.is_initialized() and torch.distributed.get_rank() == 0
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rows.csv").write_text(rows())
    (tmp_path / "broken.py").write_text(BROKEN)
    (tmp_path / "job.yaml").write_text(JOB)
    return tmp_path


def printed(head: Head, folder: Path, command: str, **environment: str) -> str:
    """What a command prints, and its exit code; it has no home to find a token in."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    own |= {"HOME": str(folder), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": head.token}
    own |= {"RAY_API_SERVER_ADDRESS": head.address}
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *shlex.split(command)],
        cwd=folder, env={k: v for k, v in (own | environment).items() if v},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=300,
    )  # fmt: skip
    text = f"$ pipeline {command}\n{done.stdout}exit code {done.returncode}\n"
    places = {str(folder): "FOLDER", head.environment["HOME"]: "HOME", head.address: "ADDRESS"}
    for place, name in places.items():
        text = text.replace(place, name)
    return text


def test_an_address_without_a_cluster(head: Head, folder: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{closed.getsockname()[1]}"
        texts = [
            printed(head, folder, "run job.yaml", RAY_ADDRESS=nobody),
            printed(head, folder, "run job.yaml", RAY_ADDRESS=f"http://{nobody}"),
            printed(head, folder, f"submit job.yaml --address http://{nobody}"),
            printed(head, folder, "status --address ftp://somewhere"),
        ]
    approve(MESSAGES / "out_of_reach.txt", "\n".join(texts))


def test_a_missing_and_a_wrong_token_for_each_command(head: Head, folder: Path) -> None:
    texts = [
        printed(head, folder, "submit job.yaml", RAY_AUTH_TOKEN=""),
        *(
            printed(head, folder, command, RAY_AUTH_TOKEN="wrong")
            for command in ("submit job.yaml", "status", "logs job", "stop job")
        ),
    ]
    wrong = {"RAY_ADDRESS": head.gcs, "RAY_AUTH_TOKEN": "wrong"}
    texts.append(printed(head, folder, "run job.yaml", **wrong))
    approve(MESSAGES / "tokens.txt", "\n".join(texts))


def test_a_cluster_that_can_never_hold_the_workers(head: Head, folder: Path) -> None:
    changes = (
        "workers.cpus_per_worker=9",
        "'workers.labels={zone: moon}'",
        "'workers.resources={lathe: 1}'",
        "'workers={num: 5, gib_per_worker: 0.5, gpu: true}'",
    )
    texts = [
        printed(head, folder, f"run job.yaml --set {change}", RAY_ADDRESS=head.gcs)
        for change in changes
    ]
    assert not (folder / "runs").exists()
    approve(MESSAGES / "too_small.txt", "\n".join(texts))


def test_a_cluster_whose_cpus_others_hold_and_a_stopped_job(head: Head, folder: Path) -> None:
    large = "--set workers.cpus_per_worker=2 --set training.epochs=1000000"
    texts = [printed(head, folder, f"submit job.yaml --yes --detach --set name=first {large}")]
    until(lambda: "\nepoch " in printed(head, folder, "logs first"))
    texts += [
        printed(head, folder, "submit job.yaml --yes --set name=second --set workers.wait=3s"),
        printed(head, folder, "stop first"),
        printed(head, folder, "stop first"),
        printed(head, folder, "stop third"),
    ]
    until(lambda: head.used_cpus() == 0)
    approve(MESSAGES / "busy.txt", "\n".join(texts))


def test_an_error_of_custom_code(head: Head, folder: Path) -> None:
    command = "submit job.yaml --yes --import broken.py --set name=own --set loss=broken"
    approve(MESSAGES / "own_error.txt", printed(head, folder, command))


def test_a_worker_that_is_killed(head: Head, folder: Path) -> None:
    loss = f"--import broken.py --set 'loss={{name: killed, once: {folder}/once}}'"
    steps = "--set training.epochs=300 --set checkpoint.every_steps=10"
    text = printed(head, folder, f"run job.yaml {loss} {steps}", RAY_ADDRESS=head.gcs)
    text, _, after = text.partition("done  900 steps")
    assert "exit code 0" in after
    text = re.sub(r"note  \w+ -?[\d.]+ is no better.*\n", "", text)
    approve(MESSAGES / "killed_worker.txt", text)


def test_rows_a_key_and_a_job_that_are_not_there(head: Head, folder: Path) -> None:
    rows_nowhere = "--set name=missing --set data.train=/nowhere/rows.parquet"
    texts = [
        printed(head, folder, f"submit job.yaml --yes {rows_nowhere}"),
        printed(head, folder, "submit job.yaml --yes --set modle=x"),
        printed(head, folder, "logs nobody"),
    ]
    approve(MESSAGES / "missing.txt", "\n".join(texts))
