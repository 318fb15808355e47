"""Runs whose storage is an object store: a real one, and nodes that share no disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pyarrow.parquet as pq
import pytest

import pipeline
from pipeline.errors import UsageError
from pipeline.rundir.journal import Reader
from tests import s3
from tests.clusters import BRAKED, until
from tests.conftest import Command, Write, happened, rows
from tests.ray_head import own_network, running_head, running_node

pytestmark = pytest.mark.ray
JOB = """
name: far
data: {{train: rows.csv, validation: 0.2, test: 0.1, inputs: [a, b], target: y}}
model: {{name: braked, brake: {brake}}}
loss: mse
training: {{epochs: 60, batch_size: 8, microbatch_size: 4, best_by: mae}}
checkpoint: {{every_steps: 10}}
workers: {workers}
storage: {storage}
"""


def job_in(folder: Path, storage: str, workers: str) -> Path:
    """A job that takes its time while there is a file `brake`."""
    (folder / "rows.csv").write_text(rows(48))
    (folder / "braked.py").write_text(BRAKED)
    text = JOB.format(brake=folder / "brake", workers=workers, storage=json.dumps(storage))
    (folder / "job.yaml").write_text(text)
    (folder / "brake").touch()
    return folder / "job.yaml"


def started(job: Path, cache: str, **environment: str) -> subprocess.Popen[str]:
    """A command on a machine that has nothing but this cache."""
    own = {
        "PIPELINE_CACHE": str(job.parent / cache),
        "MLFLOW_TRACKING_URI": f"sqlite:///{job.parent / 'mlflow.db'}",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", "run", str(job), "--json",
         "--import", str(job.parent / "braked.py")],
        env=os.environ | environment | own, cwd=job.parent, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def has_step(cache: Path, step: int) -> bool:
    """Whether the command knows of a step, and of a checkpoint before it."""
    run = next(iter(cache.glob(".runs/*/far-1")), None)  # the command's copy, once it is there
    if run is None or not list(run.glob("checkpoints/*/manifest.json")):
        return False
    return any(p["step"] >= step for p in Reader(run / "curve.jsonl").new() if "train" in p)


def alone(job: Path) -> pipeline.Result:
    """The same job in a folder, in one process."""
    changes = {"workers": {"num": 1}, "storage": str(job.parent / "alone")}
    return pipeline.run(str(job), changes, [str(job.parent / "braked.py")])


def refuse_other_bits(result: dict[str, Any], expected: pipeline.Result) -> None:
    """The same curve and weights; MLflow has each step once."""
    assert result["curve_sha256"] == expected.curve_sha256
    assert result["weights_sha256"] == expected.weights_sha256
    assert result["metrics"] == expected.metrics
    assert result["test"] == expected.test
    client = mlflow.MlflowClient(result["tracking_uri"])
    (run,) = client.search_runs([client.get_run(result["run_id"]).info.experiment_id])
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(result["run_id"], "train/loss")
    assert [one.step for one in history] == list(range(1, result["steps"] + 1))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3.Server]:
    with s3.running(tmp_path_factory.mktemp("s3")) as found:
        yield found


def test_a_stopped_run_goes_on_on_another_machine(server: s3.Server, tmp_path: Path) -> None:
    """The first machine is told to stop, the second one is lost; the third one ends the run."""
    job = job_in(tmp_path, server.uri("rows/stopped"), "{num: 1}")
    first = started(job, "first")
    until(lambda: has_step(tmp_path / "first", 15), first)
    first.send_signal(signal.SIGTERM)
    _, err = first.communicate(timeout=120)
    assert first.returncode == 128 + signal.SIGTERM, err
    assert "stopped by SIGTERM after step " in err
    assert "store s3://***@rows/stopped/far-1?" in err
    second = started(job, "second")
    until(lambda: has_step(tmp_path / "second", 50), second)
    second.kill()
    second.communicate()
    shutil.rmtree(tmp_path / "second")
    (tmp_path / "brake").unlink()
    third = started(job, "third")
    out, err = third.communicate(timeout=240)
    assert third.returncode == 0, err
    assert s3.SECRET not in out + err
    result = json.loads(out.splitlines()[-1])
    assert result["workers"] == [1, 1, 1]
    refuse_other_bits(result, alone(job))
    assert list(Path(result["storage"]).glob("system/*.jsonl"))
    assert not list((tmp_path / "third").glob(".workers/*/*")), "a copy that nobody needs"
    first = started(job, "first")  # with its copy of long ago
    out, err = first.communicate(timeout=120)
    assert first.returncode == 0, err
    assert "recording to MLflow" not in err
    assert "far-1 is finished already, on 1 worker" in err
    again = json.loads(out.splitlines()[-1])
    assert {**again, "storage": "", "first_step_seconds": 0} == {
        **result, "storage": "", "first_step_seconds": 0,
    }  # fmt: skip
    for file in tmp_path.rglob("*"):
        if file.is_file() and file != job:
            assert s3.SECRET.encode() not in file.read_bytes(), file


@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("ip"), reason="makes a network, as root with `ip`"
)
def test_nodes_that_share_no_disk(tmp_path: Path) -> None:
    """A worker on each; then the second node is lost, and the rest goes on from the store."""
    (tmp_path / "s3").mkdir()
    (tmp_path / "home").mkdir()
    (tmp_path / "cache").mkdir()
    with (
        own_network() as network,
        s3.running(tmp_path / "s3", address=network.here) as server,
        running_head(tmp_path / "home", network=network) as head,
    ):
        job = job_in(tmp_path, server.uri("rows/nodes"), "{min: 1, max: 2, placement: spread}")
        private = f"mount -t tmpfs none {tmp_path / 'cache'}"
        with running_node(head, private, network=network) as node:
            own = {**head.environment, "RAY_ADDRESS": head.gcs}
            process = started(job, "cache", **own)
            until(lambda: has_step(tmp_path / "cache", 30), process)
            os.killpg(node.pid, signal.SIGKILL)
        (tmp_path / "brake").unlink()
        out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["workers"][0] == 2
    assert len(result["workers"]) > 1, "it was started again"
    refuse_other_bits(result, alone(job))
    assert happened(Path(result["storage"]), "start")[-1]["after"], "why the attempt before ended"


def test_the_store_has_what_workers_elsewhere_begin_with(
    job: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    before = pipeline.run(job({"training.epochs": 1}))
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path / "other"))
    changes = {"storage": f"file://{tmp_path / 'store'}", "model.init_from": before.storage}
    pipeline.run(job({"training.epochs": 1}), changes)
    names = {path.name for path in (tmp_path / "store" / "small-1").iterdir()}
    assert {"record.json", "spec.yaml", "initial.pt"} <= names


def test_a_damaged_record_does_not_keep_a_run_from_going_on(
    job: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    path = job({"storage": f"file://{tmp_path / 'store'}", "checkpoint.every_steps": 2})
    before = pipeline.run(path)
    there = tmp_path / "store" / "small-1"
    (there / "done.json").unlink()
    (there / "record.json").write_bytes((there / "record.json").read_bytes()[:99])
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path / "another machine"))
    after = pipeline.run(path)
    assert Path(after.storage).name == "small-1"
    assert after.curve_sha256 == before.curve_sha256
    assert after.weights_sha256 == before.weights_sha256


def test_a_run_is_looked_at_by_its_uri(
    job: Write, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    store = f"file://{tmp_path / 'store'}"
    result = pipeline.run(job({"training.epochs": 1, "storage": store}))
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path / "another machine"))
    uri = f"{store}/small-1"
    rows = tmp_path / "data.csv"
    code, _, err = command("predict", uri, rows, "--out", tmp_path / "predicted")
    assert code == 0, err
    assert pq.read_table(tmp_path / "predicted" / "data.parquet").num_rows == 24
    code, out, _ = command("compare", uri, result.storage)
    assert code == 0
    assert "small-1" in out
    code, _, err = command("report", f"{store}/small-7")
    assert code == 2
    assert f"{store}/small-7 is not the folder of a run (no record.json)" in err
    code, _, err = command(
        "report", "s3://k:hidden@rows/x-1?scheme=http&endpoint_override=127.0.0.1:9"
    )
    assert code == 2
    assert "cannot be read: " in err
    assert "hidden" not in err


def test_what_is_refused_before_there_is_a_run(
    job: Write, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    where = f"file://{tmp_path / 'store'}"
    path = job({"storage": where})
    code, _, err = command("run", path)
    assert code == 2
    assert "MLflow's database cannot be in an object store: set MLFLOW_TRACKING_URI" in err
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    with pytest.raises(UsageError, match="`storage` is an object store already"):
        pipeline.run(path, {"checkpoint.copy_to": str(tmp_path / "copies")})
    nowhere = "s3://k:s@rows/x?scheme=http&endpoint_override=127.0.0.1:9"
    before = time.monotonic()
    with pytest.raises(UsageError, match=r"^storage: s3://\*\*\*@rows/x\S* cannot be used: "):
        pipeline.run(path, {"storage": nowhere})
    assert time.monotonic() - before < 60
