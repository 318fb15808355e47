"""A cluster out of reach, or too small for the workers, is refused before there is a run."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import UsageError
from pipeline.launch import ray_cluster
from tests.conftest import Write
from tests.processes import free_port

MAX_SECONDS = 15


def ran(path: Path, **environment: str) -> tuple[int, str, float]:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "run", path], capture_output=True, text=True,
        env=os.environ | environment, timeout=120,
    )  # fmt: skip
    return done.returncode, done.stderr, time.monotonic() - started


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A Ray head of one CPU with token authentication: its address and token."""
    token, port = secrets.token_hex(16), free_port()
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    place = tmp_path_factory.mktemp("r", numbered=False)
    process = subprocess.Popen(
        ["ray", "start", "--head", f"--port={port}", "--num-cpus=1", "--include-dashboard=false",
         "--disable-usage-stats", f"--temp-dir={place}", "--block"],
        env=environment | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        time.sleep(3)
        yield f"127.0.0.1:{port}", token
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.ray
def test_a_wrong_token_is_refused_soon_and_by_name(job: Write, head: tuple[str, str]) -> None:
    address, _ = head
    code, err, seconds = ran(
        job(), RAY_ADDRESS=address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(16)
    )
    assert code == 2, err
    assert "refuses this token" in err
    assert seconds < 45, "with the start of the command on a busy machine; by itself Ray took 52"


@pytest.mark.ray
def test_a_cluster_that_is_too_small_is_refused_before_there_is_a_run(
    job: Write, head: tuple[str, str], tmp_path: Path
) -> None:
    address, token = head
    path = job({"workers.num": 2})
    code, err, _ = ran(path, RAY_ADDRESS=address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
    assert code == 2, err
    assert "room for 1" in err
    assert not list((tmp_path / "runs").glob("small-*"))


@pytest.mark.parametrize("kind", ["closed", "silent", "http"])
def test_an_address_without_a_cluster_is_refused_soon(kind: str, job: Write) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if kind == "silent":
            listener.listen()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        shown = f"http://{address}" if kind == "http" else address
        started = time.monotonic()
        with pytest.raises(UsageError, match=f"{address}: "):
            ray_cluster.refuse_unreachable(shown)
        assert time.monotonic() - started < MAX_SECONDS
        code, err, _ = ran(job(), RAY_ADDRESS=shown)
    assert code == 2, err
    assert f"{address}: " in err
