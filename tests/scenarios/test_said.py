"""What a person reads when something fails on a cluster: compared with approved texts."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.approved import approve
from tests.conftest import rows
from tests.ray_head import Head, running_head

pytestmark = pytest.mark.ray
SAID = Path(__file__).parent / "said"
JOB = """
data: {train: rows.csv, validation: 0.2, inputs: [a, b], target: y}
model: {name: mlp, hidden: [16]}
loss: mse
training: {epochs: 2, batch_size: 8, microbatch_size: 4}
workers: {num: 2}
"""
BROKEN = '''"""A loss that fails, and one whose worker is killed, once."""

import os
import signal
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
    if is_first_worker() and len(CALLS) > 300 and not Path(once).exists():
        Path(once).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return (prediction - target) ** 2


def is_first_worker():
    """Not so in a check, which has no workers."""
    return torch.distributed.is_initialized() and torch.distributed.get_rank() == 0
'''


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with running_head(tmp_path_factory.mktemp("home")) as head:
        yield head


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    (tmp_path / "rows.csv").write_text(rows())
    (tmp_path / "broken.py").write_text(BROKEN)
    name = request.node.name.removeprefix("test_")
    (tmp_path / "job.yaml").write_text(f"name: {name}\n{JOB}")
    return tmp_path


def said(head: Head, folder: Path, *words: Any, **environment: str) -> str:
    """What a command prints, and its exit code; it has no home to find a token in."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    own |= {"HOME": str(folder), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": head.token}
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *map(str, words)],
        cwd=folder, env={k: v for k, v in (own | environment).items() if v},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=300,
    )  # fmt: skip
    text = f"$ pipeline {' '.join(map(str, words))}\n{done.stdout}exit code {done.returncode}\n"
    places = {str(folder): "FOLDER", head.environment["HOME"]: "HOME", head.address: "ADDRESS"}
    for place, name in places.items():
        text = text.replace(place, name)
    return text


def test_out_of_reach(head: Head, folder: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{closed.getsockname()[1]}"
        told = [
            said(head, folder, "run", "job.yaml", RAY_ADDRESS=nobody),
            said(head, folder, "run", "job.yaml", RAY_ADDRESS=f"http://{nobody}"),
            said(head, folder, "submit", "job.yaml", "--address", f"http://{nobody}"),
            said(head, folder, "status", "--address", "ftp://somewhere"),
        ]
    approve(SAID / "out_of_reach.txt", "\n".join(told))


def test_tokens(head: Head, folder: Path) -> None:
    told = [
        said(head, folder, *command, "--address", head.address, RAY_AUTH_TOKEN=token)
        for command in (["submit", "job.yaml"], ["status"], ["logs", "x"], ["stop", "x"])
        for token in ("", "wrong")
    ]
    told.append(said(head, folder, "run", "job.yaml", RAY_ADDRESS=head.gcs, RAY_AUTH_TOKEN="wrong"))
    approve(SAID / "tokens.txt", "\n".join(told))


def test_too_small(head: Head, folder: Path) -> None:
    changes = [
        ["--set", "workers.cpus_per_worker=9"],
        ["--set", "workers.labels={zone: moon}"],
        ["--set", "workers.resources={lathe: 1}"],
        ["--set", "workers={num: 5, gib_per_worker: 0.5, gpu: true}"],
    ]
    told = [said(head, folder, "run", "job.yaml", *c, RAY_ADDRESS=head.gcs) for c in changes]
    assert not (folder / "runs").exists()
    approve(SAID / "too_small.txt", "\n".join(told))


def test_busy(head: Head, folder: Path) -> None:
    at = ["--address", head.address]
    command = ["submit", "job.yaml", *at, "--yes"]
    detached = said(
        head,
        folder,
        *command,
        "--detach",
        "--set",
        "name=first",
        "--set",
        "workers.cpus_per_worker=2",
        "--set",
        "training.epochs=1000000",
    )
    deadline = time.monotonic() + 120
    while "\nepoch " not in said(head, folder, "logs", "first", *at):
        assert time.monotonic() < deadline
    told = [
        detached,
        said(head, folder, *command, "--set", "workers.wait=12s"),
        said(head, folder, "stop", "first", *at),
        said(head, folder, "stop", "first", *at),
        said(head, folder, "stop", "third", *at),
    ]  # fmt: skip
    approve(SAID / "busy.txt", "\n".join(told))


def test_an_error_of_the_users_own(head: Head, folder: Path) -> None:
    command = ["submit", "job.yaml", "--address", head.address, "--yes", "--import", "broken.py"]
    told = said(head, folder, *command, "--set", "loss=broken")
    assert len(told.splitlines()) < 45
    approve(SAID / "own_error.txt", told)


def test_a_killed_worker(head: Head, folder: Path) -> None:
    loss = f"loss={{name: killed, once: {folder}/once}}"
    told = said(head, folder, "run", "job.yaml", "--import", "broken.py", "--set", loss,
                "--set", "training.epochs=300", "--set", "checkpoint.every_steps=10",
                RAY_ADDRESS=head.gcs)  # fmt: skip
    told, _, after = told.partition("done  900 steps")
    assert "exit code 0" in after
    approve(SAID / "killed_worker.txt", re.sub(r"note  \w+ -?[\d.]+ is no better.*\n", "", told))


def test_missing(head: Head, folder: Path) -> None:
    command = ["submit", "job.yaml", "--address", head.address, "--yes"]
    told = [
        said(head, folder, *command, "--set", "data.train=/nowhere/rows.parquet"),
        said(head, folder, *command, "--set", "modle=x"),
        said(head, folder, "logs", "missed", "--address", head.address),
    ]
    approve(SAID / "missing.txt", "\n".join(told))
