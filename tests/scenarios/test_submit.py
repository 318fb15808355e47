"""`pipeline submit` on a real head: start, attach, detach, stop, resume, result; and no secret."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest

import pipeline
from tests.conftest import JOBS, rows
from tests.ray_head import Head

pytestmark = pytest.mark.ray
SLOW = """
name: slow
data: {train: ../data/rows.csv, validation: 0.2, inputs: [a, b], target: y}
model: {name: mlp, hidden: [64]}
loss: mse
training: {epochs: 100000, batch_size: 8, microbatch_size: 4}
"""


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    """A job that does not end by itself, with its rows in a folder beside."""
    for name in ("jobs", "data"):
        (tmp_path / name).mkdir()
    (tmp_path / "data" / "rows.csv").write_text(rows())
    (tmp_path / "jobs" / "slow.yaml").write_text(SLOW)
    return tmp_path / "jobs" / "slow.yaml"


def started(head: Head, *words: Any, **environment: str) -> subprocess.Popen[str]:
    """A command, as on the machine of whoever submits: with another home, and the token."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    own |= {"RAY_AUTH_TOKEN": head.token, "RAY_API_SERVER_ADDRESS": head.address}
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", *map(str, words)],
        env={k: v for k, v in (own | environment).items() if v}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ran(head: Head, *words: Any, **environment: str) -> tuple[int, str, str]:
    process = started(head, *words, **environment)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def listed(head: Head, name: str) -> list[dict[str, Any]]:
    code, out, err = ran(head, "status", name, "--json")
    assert code == 0, err
    return [json.loads(line) for line in out.splitlines()]


def steps_of(result: dict[str, Any]) -> list[int]:
    client = mlflow.MlflowClient(result["tracking_uri"])
    return [one.step for one in client.get_metric_history(result["run_id"], "train/loss")]


def test_the_curve_is_the_local_runs_and_the_same_command_tells_the_result(
    head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("custom_loss.yaml", "custom_loss.py"):
        shutil.copy(JOBS / name, tmp_path / name)
    command = ["submit", tmp_path / "custom_loss.yaml", "--import", tmp_path / "custom_loss.py",
               "--set", "workers.num=2", "--set", "training.epochs=2",
               "--set", "training.microbatch_size=8", "--json"]  # fmt: skip
    code, out, err = ran(head, *command, "--yes")
    assert code == 0, err
    result = json.loads(out)
    assert "sends    job/custom_loss.yaml" in err
    assert "INFO" not in err
    monkeypatch.chdir(tmp_path)
    changes = {"training.epochs": 2, "training.microbatch_size": 8}
    local = pipeline.run("custom_loss.yaml", changes, ["custom_loss.py"])
    assert result["curve_sha256"] == local.curve_sha256
    assert result["weights_sha256"] == local.weights_sha256
    assert sorted(steps_of(result)) == list(range(1, result["steps"] + 1))
    run = mlflow.MlflowClient(result["tracking_uri"]).get_run(result["run_id"])
    assert run.data.tags["ray.job_id"] == result["submission_id"]
    assert run.data.tags["mlflow.source.type"] == "JOB"
    code, out, err = ran(head, *command)
    assert code == 0, err
    assert f"shows the result of {result['submission_id']}" in err
    assert json.loads(out) == result
    assert len(listed(head, "custom_loss")) == 1


def certified(folder: Path) -> tuple[Path, ssl.SSLContext]:
    """A certificate for this machine that nobody knows, and a server's context with it."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1",
         "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    return certificate, context


@contextmanager
def behind_tls(head: Head, context: ssl.SSLContext) -> Iterator[str]:
    """The address of a proxy in front of the dashboard, as a company has one."""
    host, port = head.address.removeprefix("http://").split(":")

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while piece := await reader.read(2**16):
                writer.write(piece)
                await writer.drain()
        writer.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner, outer = await asyncio.open_connection(host, int(port))
        await asyncio.gather(pump(reader, outer), pump(inner, writer))

    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(relay, "127.0.0.1", 0, ssl=context))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def test_behind_tls_a_job_is_sent_with_a_token_from_a_file_and_followed(
    head: Head, slow: Path, tmp_path: Path
) -> None:
    certificate, context = certified(tmp_path)
    token = tmp_path / "token"
    token.write_text(head.token)
    changes = ["--set", "name=tls", "--set", "training.epochs=2"]
    with behind_tls(head, context) as address:
        command = ["submit", slow, "--yes", "--json", "--address", address, *changes]
        code, _, err = ran(head, *command)
        assert (code, len(err.splitlines())) == (2, 1)
        assert "its certificate is not trusted (self-signed certificate): set SSL_CERT_FILE" in err
        trusted = {"SSL_CERT_FILE": str(certificate), "RAY_AUTH_TOKEN_PATH": str(token)}
        code, out, err = ran(head, *command, RAY_AUTH_TOKEN="", **trusted)
        assert code == 0, err
        assert json.loads(out)["state"] == "finished"
        assert "\ndone  " in err


def test_it_is_left_stopped_and_resumed(head: Head, slow: Path) -> None:
    first = started(head, "submit", slow, "--yes")
    second = started(head, "submit", slow, "--yes")  # at the same time
    assert first.stderr is not None
    for line in first.stderr:
        if line.startswith("epoch "):
            break
    first.send_signal(signal.SIGINT)
    _, err = first.communicate(timeout=60)
    assert first.returncode == 0, err
    assert "detached: the job goes on" in err
    (only,) = listed(head, "slow")
    assert only["status"] == "RUNNING"
    code, out, err = ran(head, "stop", "slow")
    assert code == 0, err
    assert f"{only['id']} has ended: stopped" in out
    _, err = second.communicate(timeout=60)
    assert second.returncode == 128 + signal.SIGTERM, err
    assert "from where the same command resumes" in err

    code, _, err = ran(head, "submit", slow, "--yes", "--detach")
    assert code == 0, err
    assert f"resumes {only['id']}, which has stopped" in err
    deadline = time.monotonic() + 120
    while "note  resuming from step" not in (log := ran(head, "logs", "slow")[1]):
        assert time.monotonic() < deadline, log
        time.sleep(1)
    assert ran(head, "stop", "slow")[0] == 0
    ids = [one["id"] for one in listed(head, "slow")]
    assert ids == [f"{only['id'][:-1]}2", only["id"]]
    (storage,) = Path(head.environment["HOME"]).glob("runs/slow-*")
    recorded = json.loads((storage / "recorded.json").read_text())
    state = recorded.get("content", recorded)
    client = mlflow.MlflowClient(state["tracking_uri"])
    tags = client.get_run(state["run_id"]).data.tags
    assert tags["ray.job_ids"] == ", ".join(reversed(ids))
    steps = [one.step for one in client.get_metric_history(state["run_id"], "train/loss")]
    assert sorted(steps) == list(range(1, len(steps) + 1))


def test_the_token_stands_in_no_file_list_or_log(head: Head, slow: Path, tmp_path: Path) -> None:
    code, _, err = ran(
        head, "submit", slow, "--yes", "--set", "name=short", "--set", "training.epochs=2",
        MLFLOW_TRACKING_URI="http://me:geheim123@127.0.0.1:9",
    )  # fmt: skip
    assert code == 0, err
    assert "it stays here" in err
    places = [Path(head.environment["HOME"]), head.temporary, tmp_path]
    files = [path for place in places for path in place.rglob("*")]
    for path in files:
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            assert head.token.encode() not in content, path
            assert b"geheim123" not in content, path
    for process in psutil.process_iter(["cmdline"]):
        assert head.token not in " ".join(process.info["cmdline"] or [])
    assert head.token not in json.dumps(listed(head, "short"))
