"""The command that opens MLflow's page, with a real server."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

import pipeline
from pipeline.tracking import page
from tests.conftest import Command, Write
from tests.processes import free_port


def test_an_address_shows_a_run_in_the_view_for_training() -> None:
    assert page.address("http://host/", "3", "abc") == (
        "http://host/#/experiments/3/runs/abc?workflowType=machine_learning"
    )
    assert page.address("http://host") == (
        "http://host/#/experiments?workflowType=machine_learning"
    )


def test_it_serves_the_store_beside_a_run_until_ctrl_c(job: Write) -> None:
    result = pipeline.run(job())
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "ui", result.storage, "--port", str(port),
         "--no-browser"], stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        server, _, rest = address.partition("/#/")
        assert rest == (
            f"experiments/{result.experiment_id}/runs/{result.run_id}?workflowType=machine_learning"
        )
        url = f"{server}/api/2.0/mlflow/runs/get?run_id={result.run_id}"
        with urllib.request.urlopen(url) as answer:
            assert "mlflow.note.content" in answer.read().decode()
        page_of = urllib.request.urlopen(server).read().decode()
        assert re.search("<title>MLflow</title>", page_of)
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    with contextlib.closing(socket.socket()) as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0, "the server has ended too"


def test_a_port_that_is_taken_and_a_folder_without_runs_are_errors(
    job: Write, command: Command, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    code, _, err = command("ui", empty, "--no-browser")
    assert (code, "no run was recorded here" in err) == (2, True)
    result = pipeline.run(job())
    with contextlib.closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = command("ui", result.storage, "--port", port, "--no-browser")
    assert (code, f"--port {port}: another process has it" in err) == (2, True)


@pytest.mark.parametrize("folder", ["run", "storage"])
def test_a_servers_own_page_is_shown(
    folder: str, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@mlflow.example")
    code, out, err = command("ui", tmp_path, "--no-browser")
    assert code == 0, err
    assert out == "http://***@mlflow.example/#/experiments?workflowType=machine_learning\n"
