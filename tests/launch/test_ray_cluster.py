"""A cluster out of reach is refused soon."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
