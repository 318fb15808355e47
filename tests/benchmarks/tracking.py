"""What MLflow's server takes a second on PostgreSQL: steps of runs, and the bytes that they leave.

The server is that of the Kubernetes manifests, with one process; database, server and clients share
this machine. A client logs batches of 1000 metrics, as a run's uploader does: four of each step.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from pipeline.kubernetes.platform import find_kubectl
from tests.benchmarks.harness import Result
from tests.k8s import mlflow_pod
from tests.k8s.conftest import K8S, ROOT
from tests.k8s.documents import render

ROUNDS = 1
METRICS_PER_STEP, PER_REQUEST = 4, 1000
CLIENTS = (1, 4, 16)


def post(port: int, path: str, body: dict[str, Any]) -> Any:
    """MLflow's answer."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/api/2.0/mlflow/{path}", json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read() or b"{}")


def log(port: int, run_id: str, num_requests: int) -> None:
    """A run's metrics, request after request."""
    steps = PER_REQUEST // METRICS_PER_STEP
    for number in range(num_requests):
        metrics = [
            {"key": f"m{key}", "value": 0.5, "timestamp": step, "step": number * steps + step}
            for step in range(steps)
            for key in range(METRICS_PER_STEP)
        ]
        post(port, "runs/log-batch", {"run_id": run_id, "metrics": metrics})


def measured(port: int, clients: int, num_requests: int) -> Result:
    """So many runs at a time."""
    runs = [
        post(port, "runs/create", {"experiment_id": "0"})["run"]["info"]["run_id"]
        for _ in range(clients)
    ]
    cpu, started = cpu_seconds(f"{port}"), time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(lambda run: log(port, run, num_requests), runs))
    took = time.perf_counter() - started
    num_metrics = clients * num_requests * PER_REQUEST
    return {
        "runs_at_a_time": clients,
        "metrics_per_second": num_metrics / took,
        "server_cpu_seconds_per_million": (cpu_seconds(f"{port}") - cpu) / num_metrics * 1e6,
    }


def cpu_seconds(word: str) -> float:
    """Of all processes with this word in their command line."""
    found = 0.0
    for process in psutil.process_iter(["cmdline", "cpu_times"]):
        if any(word in part for part in process.info["cmdline"] or []):
            times = process.info["cpu_times"]
            found += times.user + times.system
    return found


def results(rounds: int, quick: bool) -> Iterator[Result]:
    """Metrics a second by the number of runs at a time; then bytes a metric."""
    kubectl = find_kubectl()
    assert kubectl is not None
    manifests = render(kubectl, K8S / "overlays/local")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "pod"
        folder.mkdir()
        with (
            mlflow_pod.database(Path(name)) as database,
            mlflow_pod.running(manifests, database, folder) as port,
        ):
            num_requests = 2 if quick else 40
            before = size(Path(name) / "data")
            for clients in CLIENTS:
                yield measured(port, clients, max(1, num_requests // clients * 2))
            num_metrics = sum(max(1, num_requests // n * 2) * n for n in CLIENTS) * PER_REQUEST
            yield whole_run(port, Path(name))
            yield {"database_bytes_per_metric": (size(Path(name) / "data") - before) / num_metrics}


def whole_run(port: int, folder: Path) -> Result:
    """What a small run asks of the server from its start to its model, training left out."""
    cpu = cpu_seconds(f"{port}")
    words = ["run", str(ROOT / "jobs/diabetes.yaml"), "--set", f"storage={folder}/runs"]
    subprocess.run(
        [sys.executable, "-m", "pipeline", *words], check=True, capture_output=True,
        env=os.environ | {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"},
    )  # fmt: skip
    return {"server_cpu_seconds_of_a_run": cpu_seconds(f"{port}") - cpu}


def size(folder: Path) -> int:
    """Of a database's tables and indexes, without its log of writes."""
    return sum(file.stat().st_size for file in (folder / "base").rglob("*") if file.is_file())
