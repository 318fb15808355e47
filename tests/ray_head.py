"""A real Ray head with token authentication, for tests."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.processes import free_port

BIN = Path(sys.executable).parent
ANY_PORT = "--dashboard-agent-listen-port=0"
"""With its fixed port, a second head or node on a machine has no agent, and runs no job."""


@dataclass
class Head:
    """Where a running head answers, and what its clients need in their environment."""

    address: str
    token: str
    environment: dict[str, str]
    temporary: Path
    """Ray's own folder, with its logs."""
    gcs: str
    """Address for drivers and nodes."""
    pid: int

    def kill(self) -> None:
        """All of its processes at once, as when its machine is lost."""
        process = psutil.Process(self.pid)
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()

    def nodes(self) -> list[str]:
        """Addresses of the living nodes."""
        listed = self._get("/api/v0/nodes")["data"]["result"]["result"]
        return [one["node_ip"] for one in listed if one["state"] == "ALIVE"]

    def used_cpus(self) -> float:
        """How many are held by jobs, as the dashboard knows it, some seconds late."""
        status = self._get("/api/cluster_status")["data"]["clusterStatus"]
        return float(status["loadMetricsReport"]["usage"]["CPU"][0])

    def _get(self, path: str) -> Any:
        request = urllib.request.Request(f"{self.address}{path}")
        request.add_header("Authorization", f"Bearer {self.token}")
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.loads(answer.read())

    def status(self, token: str | None) -> int:
        """HTTP status of the jobs API with this token."""
        request = urllib.request.Request(f"{self.address}/api/jobs/")
        if token:
            request.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code


@dataclass
class Network:
    """Two addresses of this machine that reach each other, one of them in a namespace."""

    name: str
    here: str
    there: str


@contextmanager
def own_network() -> Iterator[Network]:
    """A network namespace, as another machine has it: its 127.0.0.1 is not ours. Needs root."""
    name, number = f"n{secrets.token_hex(3)}", secrets.randbelow(250)
    network = Network(name, f"10.77.{number}.1", f"10.77.{number}.2")
    commands = [
        f"netns add {name}",
        f"link add {name}a type veth peer name {name}b",
        f"link set {name}b netns {name}",
        f"addr add {network.here}/24 dev {name}a",
        f"-n {name} addr add {network.there}/24 dev {name}b",
        f"link set {name}a up",
        f"-n {name} link set lo up",
        f"-n {name} link set {name}b up",
    ]
    try:
        for command in commands:
            subprocess.run(["ip", *command.split()], check=True)
        yield network
    finally:
        subprocess.run(["ip", "link", "del", f"{name}a"], check=False)
        subprocess.run(["ip", "netns", "del", name], check=False)


@contextmanager
def running_head(
    home: Path,
    before: Head | None = None,
    network: Network | None = None,
    options: Sequence[str] = (),
) -> Iterator[Head]:
    """A head of four CPUs, whose jobs have this home; with the address and token of one before."""
    here = network.here if network else "127.0.0.1"
    token, port, dashboard = secrets.token_hex(16), free_port(), free_port()
    if before:
        token, dashboard = before.token, int(before.address.rpartition(":")[2])
    temporary = Path("/tmp") / f"ray-{secrets.token_hex(3)}"  # sockets need a short path
    environment = {
        **{k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")},
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "HOME": str(home),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }
    log = (home / "head.log").open("wb")
    process = subprocess.Popen(
        [str(BIN / "ray"), "start", "--head", "--block", f"--port={port}", "--num-cpus=4",
         "--num-gpus=0",
         "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
         f"--temp-dir={temporary}", "--object-store-memory=100000000", ANY_PORT,
         *([f"--node-ip-address={here}"] if network else []), *options],
        env=environment, stdout=log, stderr=log, start_new_session=True,
    )  # fmt: skip
    found = Head(f"http://127.0.0.1:{dashboard}", token, environment, temporary,
                 f"{here}:{port}", process.pid)  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                if found.status(token) == 200 and found.nodes():
                    break
            except OSError:
                pass
            assert process.poll() is None, Path(log.name).read_text()
            assert time.monotonic() < deadline, "the head did not answer within two minutes"
            time.sleep(0.5)
        yield found
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def running_node(
    head: Head, *before: str, cpus: int = 2, network: Network | None = None,
    options: Sequence[str] = ("--num-gpus=0",),
) -> Iterator[subprocess.Popen[bytes]]:  # fmt: skip
    """One more node, started after a shell's commands."""
    start = [
        str(BIN / "ray"),
        "start",
        f"--address={head.gcs}",
        "--block",
        f"--num-cpus={cpus}",
        *options,
        "--object-store-memory=100000000",
        ANY_PORT,
        *([f"--node-ip-address={network.there}"] if network else []),
    ]
    words = ["sh", "-c", " && ".join([*before, f"exec {shlex.join(start)}"])]
    if before:
        words = ["unshare", "-m", *words]
    if network:
        words = ["ip", "netns", "exec", network.name, *words]
    leaves = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "8"}  # after a SIGTERM
    num = len(head.nodes())
    process = subprocess.Popen(
        words, env={**head.environment, **leaves}, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while len(head.nodes()) <= num:
            assert process.poll() is None
            assert time.monotonic() < deadline, "the node did not come within a minute"
            time.sleep(0.5)
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        deadline = time.monotonic() + 60
        while len(head.nodes()) > num:
            assert time.monotonic() < deadline, "the node is there still after a minute"
            time.sleep(0.5)
