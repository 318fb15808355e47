"""MLflow's page: its address for a run or an experiment, and a server that shows a store."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from pipeline.errors import UsageError

START_SECONDS = 120.0
"""How long MLflow's server may take to answer for the first time."""
END_SECONDS = 5.0
"""How long it may take to end."""
LOOK_SECONDS = 0.2


def address(server: str, experiment_id: str = "", run_id: str = "") -> str:
    """Where the page shows a run or an experiment, in the view for training."""
    place = f"experiments/{experiment_id}/runs" if experiment_id else "experiments"
    place = f"{place}/{run_id}" if run_id else place
    return f"{server.rstrip('/')}/#/{place}?workflowType=machine_learning"


def comparison(server: str, experiment_ids: Sequence[str], run_ids: Sequence[str]) -> str:
    """Where the page shows runs side by side."""
    runs, experiments = (quote(json.dumps(ids)) for ids in (run_ids, sorted(set(experiment_ids))))
    query = f"runs={runs}&experiments={experiments}&workflowType=machine_learning"
    return f"{server.rstrip('/')}/#/compare-runs?{query}"


@contextlib.contextmanager
def serving(uri: str, port: int) -> Iterator[str]:
    """The address of an MLflow server over the store at `uri`, for this machine only.

    Raises UsageError where the port is taken, or the server ends before it answers.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise UsageError(f"--port {port}: another process has it; take another") from None
    server = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [
            str(Path(sys.executable).with_name("mlflow")),
            "server",
            f"--backend-store-uri={uri}",
            "--host=127.0.0.1",
            f"--port={port}",
            "--workers=1",
        ],
        env={
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # a dozen processes that nothing needs
            "MLFLOW_DISABLE_TELEMETRY": "true",
            **os.environ,
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        until = time.monotonic() + START_SECONDS
        while not _answers(server):
            if process.poll() is not None or time.monotonic() > until:
                raise UsageError(f"MLflow's server does not start over {uri}")
            time.sleep(LOOK_SECONDS)
        yield server
    finally:
        _end_group(process)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the server and the processes that it started."""
    until = time.monotonic() + END_SECONDS
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        while time.monotonic() < until:
            process.poll()
            os.killpg(process.pid, 0)
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _answers(server: str) -> bool:
    import urllib.request  # slow to import, and most commands start no server

    try:
        with urllib.request.urlopen(f"{server}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
