"""A cluster out of reach is refused soon; one of the process's own is its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pipeline
from pipeline.errors import UsageError
from pipeline.launch import ray_cluster
from tests.conftest import Write

MAX_SECONDS = 15


def ran(path: Path, **environment: str) -> tuple[int, str, float]:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "run", path], capture_output=True, text=True,
        env=os.environ | environment, timeout=120,
    )  # fmt: skip
    return done.returncode, done.stderr, time.monotonic() - started


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


@pytest.mark.ray
def test_a_process_that_had_a_cluster_with_a_token_can_start_one_of_its_own(
    monkeypatch: pytest.MonkeyPatch, job: Write
) -> None:
    """As `ray.init()` makes one since Ray 2.60; a process keeps its mode and its token in mind."""
    from ray._private.authentication.authentication_token_setup import _enable_token_auth
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "one of another cluster, long enough")
    _enable_token_auth()
    assert AuthenticationTokenLoader.instance().get_token_for_http_header()
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    assert pipeline.run(job({"workers.num": 2, "training.epochs": 1})).workers == [2]
