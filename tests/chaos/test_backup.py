"""A run's copy in an object store: a machine that has nothing of the run resumes from there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pyarrow.fs as pafs
import pytest

import pipeline
from pipeline.errors import StoppedError, UsageError
from pipeline.rundir import RunDir, checkpoint
from pipeline.rundir.backup import Backup, Backups
from pipeline.rundir.journal import Reader
from pipeline.train import determinism, state
from pipeline.train.job import prepare
from pipeline.train.step import train_step
from tests import s3
from tests.chaos import harness
from tests.chaos.harness import Case
from tests.conftest import Command, Write


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3.Server]:
    with s3.running(tmp_path_factory.mktemp("s3")) as found:
        yield found


def copying(tree: dict[str, Any], uri: str) -> dict[str, Any]:
    """The spec with a copy of its runs."""
    return {**tree, "checkpoint": {**tree["checkpoint"], "copy_to": uri}}


def copied(whole: Case, server: s3.Server, name: str, kill: int) -> tuple[dict[str, Any], Path]:
    """A run that was copied, and killed before step `kill`; and its folder, gone."""
    base, tree, _ = whole
    tree = copying(tree, server.uri("rows/copies"))
    place = harness.fresh(base / name)
    harness.attempt({**tree, "pause": 0.3}, place, 3, None, [(2, kill)])
    shutil.rmtree(place)
    return tree, harness.fresh(place)


def backup(tree: dict[str, Any], place: Path) -> Backup:
    return Backups(tree["checkpoint"]["copy_to"]).of(place.name)


def pulled(tree: dict[str, Any], place: Path) -> int:
    return backup(tree, place).pull(RunDir(place), 0)[0]


def test_a_run_resumes_from_its_backup_with_the_same_bits(whole: Case, server: s3.Server) -> None:
    tree, place = copied(whole, server, "lost-1", 18)
    step = pulled(tree, place)
    assert 4 <= step <= 16
    job = prepare(pipeline.load(tree), Path())
    assert checkpoint.newest(RunDir(place), determinism.identity(job)) == (step, [])
    harness.completed(tree, place)
    assert harness.left(place) == whole[2]
    shutil.rmtree(place)  # and of a finished run the result
    assert pulled(tree, harness.fresh(place)) == 0
    done = json.loads((place / "done.json").read_text())
    assert done["weights_sha256"] == whole[2]["weights"]
    points = list(Reader(place / "curve.jsonl").new())
    assert [p["step"] for p in points if "train" in p] == whole[2]["steps"]


@pytest.fixture(scope="module")
def intact(whole: Case, server: s3.Server) -> dict[str, Any]:
    """The spec of a run that was killed and whose copy is `intact-1`."""
    return copied(whole, server, "intact-1", 20)[0]


@pytest.mark.parametrize("what", ["state.pt", "manifest.json", "curve"])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_a_damaged_backup_is_skipped(
    whole: Case, server: s3.Server, intact: dict[str, Any], what: str, how: str
) -> None:
    tree, files, place = intact, server.filesystem, whole[0] / f"damaged-{what}-{how}-1"
    root = f"rows/copies/{place.name}"
    pafs.copy_files(
        "rows/copies/intact-1", root, source_filesystem=files, destination_filesystem=files
    )
    newest = pulled(tree, harness.fresh(place))
    name = f"step-{newest:010}/{what}"
    if what == "curve":
        selector = pafs.FileSelector(root)
        curves = sorted(
            i.base_name for i in files.get_file_info(selector) if "curve" in i.base_name
        )
        name = curves[-1]
    with files.open_input_stream(f"{root}/{name}") as file:
        content = bytearray(file.read())
    if how == "gone":
        files.delete_file(f"{root}/{name}")
    else:
        content[len(content) // 2] ^= 1
        kept = content if how == "flipped" else content[: len(content) // 2]
        with files.open_output_stream(f"{root}/{name}") as file:
            file.write(bytes(kept))
    place = harness.fresh(place)
    step, passed = backup(tree, place).pull(RunDir(place), 0)
    assert step < newest
    assert f"step-{newest:010} in the backup skipped: " in passed[0]
    assert not list(place.glob(f"checkpoints/step-{newest:010}")), "nothing of it is left"
    harness.completed(tree, place)
    assert harness.left(place) == whole[2]


def test_the_copy_follows_a_run_that_passed_checkpoints_over(
    whole: Case, server: s3.Server
) -> None:
    """Its curve was damaged before them: what is recomputed is copied, old ones are not."""
    base, tree, reference = whole
    tree = copying(tree, server.uri("rows/copies"))
    place = harness.fresh(base / "passed-1")
    slowly = {**tree, "pause": 0.2}
    harness.attempt(slowly, place, 3, None, [(2, 19)])
    newest = backup(tree, place).checkpoints()[-1]
    assert newest == "step-0000000016", "as soon as it was written"
    lines = (place / "curve.jsonl").read_bytes().splitlines(keepends=True)
    (number,) = [n for n, line in enumerate(lines) if b'{"time"' in line and b'"step": 7,' in line]
    lines[number] = b"?" + lines[number][1:]
    (place / "curve.jsonl").write_bytes(b"".join(lines))
    harness.attempt(slowly, place, 3, None, [(2, 11)])
    shutil.rmtree(place)
    assert pulled(tree, harness.fresh(place)) in (4, 8, 12, 16)
    job = prepare(pipeline.load(tree), Path())
    points = Reader(place / "curve.jsonl").new()
    reached = max(point["step"] for point in points if "train" in point)
    assert checkpoint.newest(RunDir(place), determinism.identity(job), reached)[0] >= 4
    harness.completed(tree, place)
    assert harness.left(place) == reference


def test_what_a_killed_command_left_in_the_copy_is_deleted_in_its_turn(
    whole: Case, server: s3.Server
) -> None:
    base, tree, reference = whole
    tree = copying(tree, server.uri("rows/copies"))
    place = harness.fresh(base / "half-1")
    with server.filesystem.open_output_stream("rows/copies/half-1/step-0000000001/state.pt") as f:
        f.write(b"half")
    harness.completed({**tree, "pause": 0.1}, place)
    assert harness.left(place) == reference
    kept = backup(tree, place).checkpoints()
    assert kept == ["step-0000000020", "step-0000000024"]
    assert not any(b'"event": "copy"' in line for line in (place / "curve.jsonl").open("rb"))


@pytest.mark.chaos
def test_a_store_that_is_down_does_not_stop_training(whole: Case) -> None:
    base, tree, reference = whole
    nowhere = "s3://k:s@rows/x?scheme=http&endpoint_override=127.0.0.1:9"
    tree = copying(tree, nowhere)
    place = harness.fresh(base / "down-1")
    assert harness.attempt(tree, place, 3) == [0, 0, 0]
    assert harness.left(place) == reference


def test_the_same_command_on_another_machine(
    job: Write, server: s3.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    command: Command,
) -> None:  # fmt: skip
    """Its storage is empty; MLflow's run, curve and all, is the same one."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    where = server.uri("rows/jobs")
    path = job({"training.epochs": 20, "checkpoint": {"every_steps": 5, "copy_to": where}})
    step = train_step

    def stopped(*given: Any, **more: Any) -> Any:
        if given[3].step == 33:
            raise StoppedError(15)
        return step(*given, **more)

    monkeypatch.setattr(state, "train_step", stopped)
    with pytest.raises(StoppedError):
        pipeline.run(path)
    monkeypatch.setattr(state, "train_step", step)
    shutil.rmtree(path.parent / "runs")
    code, _, err = command("run", path, "--set", "optimizer.lr=0.5")
    assert code == 2
    assert "small-1 is not finished, and what it trains has changed:\n  optimizer.lr" in err
    code, out, err = command("run", path, "--json")
    assert code == 0, err
    assert "small-1 comes back from its copy in s3://***@rows/jobs" in err
    assert s3.SECRET not in out + err
    found = json.loads(out.splitlines()[-1])
    client = mlflow.MlflowClient(found["tracking_uri"])
    run = client.get_run(found["run_id"])
    assert len(client.search_runs([run.info.experiment_id])) == 1
    history = client.get_metric_history(found["run_id"], "train/loss")
    assert [m.step for m in history] == list(range(1, found["steps"] + 1))
    alone = pipeline.run(path, {"checkpoint.copy_to": None, "storage": str(tmp_path / "other")})
    assert alone.weights_sha256 == found["weights_sha256"]
    for file in (path.parent / "runs").rglob("*"):
        assert file.is_dir() or s3.SECRET.encode() not in file.read_bytes(), file
    again = pipeline.run(path, fresh=True)
    assert Path(again.storage).name == "small-2"


@pytest.mark.chaos
def test_of_two_machines_with_one_backup_the_later_one_continues(
    job: Write, tmp_path: Path
) -> None:
    """The first was only cut off: it stops at its next copy, and MLflow holds each step once."""
    path = job({
        "model": {"name": "mlp", "hidden": [8], "dropout": 0.1},
        "training": {"epochs": 2500, "batch_size": 6, "microbatch_size": 2},
        "checkpoint": {"every_steps": 250, "copy_to": str(tmp_path / "copies")},
    })  # fmt: skip
    tracking = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}"}

    def started(storage: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline", "run", str(path), "--json",
             "--set", f"storage={tmp_path / storage}"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | tracking,
        )  # fmt: skip

    def wait_for(pattern: str) -> None:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob(pattern)):
            assert time.monotonic() < deadline, pattern
            time.sleep(0.02)

    first = started("here")
    wait_for("copies/small-1/step-*/manifest.json")
    first.send_signal(signal.SIGSTOP)
    second = started("there")
    wait_for("there/small-1/checkpoints/step-*")
    first.send_signal(signal.SIGCONT)
    _, err = first.communicate(timeout=240)
    assert first.returncode == 1, err
    assert f"process {second.pid} on {socket.gethostname()} has resumed this run" in err
    assert "Traceback" not in err
    out, err = second.communicate(timeout=240)
    assert second.returncode == 0, err
    assert "small-1 comes back from its copy" in err
    found = json.loads(out.splitlines()[-1])
    alone = pipeline.run(path, {"checkpoint.copy_to": None, "storage": str(tmp_path / "alone")})
    assert found["curve_sha256"] == alone.curve_sha256
    assert found["weights_sha256"] == alone.weights_sha256
    client = mlflow.MlflowClient(found["tracking_uri"])
    (run,) = client.search_runs([client.get_run(found["run_id"]).info.experiment_id])
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(found["run_id"], "train/loss")
    assert [(m.step, m.value) for m in history] == list(enumerate(alone.losses, start=1))


def test_an_unusable_object_store_is_refused_before_training(job: Write) -> None:
    nowhere = "s3://k:s@rows/x?scheme=http&endpoint_override=127.0.0.1:9"
    with pytest.raises(UsageError, match=r"checkpoint.copy_to: s3://\*\*\*@rows"):
        pipeline.run(job({"checkpoint": {"copy_to": nowhere}}))
    with pytest.raises(UsageError, match=r"checkpoint.copy_to: what://x"):
        pipeline.run(job({"checkpoint": {"copy_to": "what://x"}}))
