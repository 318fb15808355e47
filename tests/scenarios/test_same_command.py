"""The same command again: a killed run goes on, a finished one says so, another job is refused."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import mlflow
import pytest

import pipeline
from pipeline.errors import UsageError
from pipeline.launch import progress
from pipeline.launch.signals import _Happened
from pipeline.rundir import RunDir
from pipeline.rundir.journal import Reader
from pipeline.rundir.records import Record
from pipeline.tracking import process as uploading
from tests.conftest import Command, Write
from tests.processes import free_port

LONG = {
    "training": {"epochs": 1000, "batch_size": 6, "microbatch_size": 2},
    "model": {"name": "mlp", "hidden": [8], "dropout": 0.1},
    "checkpoint.every_steps": 50,
}


def started(path: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", "run", str(path), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def points(path: Path) -> list[Any]:
    return list(Reader(path.parent / "runs" / "small-1" / "curve.jsonl").new())


def until_step(path: Path, step: int, process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + 120
    while not (steps := [p["step"] for p in points(path)]) or max(steps) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the run did not get there"
        time.sleep(0.05)


def stopped(process: subprocess.Popen[str], number: signal.Signals) -> tuple[int, str]:
    process.send_signal(number)
    _, err = process.communicate(timeout=240)
    return process.returncode, err


def status(path: Path) -> str:
    record = json.loads((path.parent / "runs" / "small-1" / "recorded.json").read_text())
    run = mlflow.MlflowClient(record["tracking_uri"]).get_run(record["run_id"])
    return str(run.info.status)


def test_a_run_that_was_killed_and_stopped_ends_with_the_same_bits_recorded_once(
    job: Write, tmp_path: Path
) -> None:
    path = job(LONG)
    alone = pipeline.run(path, {"storage": str(tmp_path / "alone")})

    process = started(path)
    until_step(path, 300, process)
    code, _ = stopped(process, signal.SIGKILL)
    assert code == -signal.SIGKILL

    process = started(path)
    until_step(path, 900, process)
    code, err = stopped(process, signal.SIGTERM)
    assert code == 128 + signal.SIGTERM, err
    assert "resuming from step" in err
    assert "stopped by SIGTERM after step" in err
    assert "Traceback" not in err
    assert status(path) == "KILLED"
    last = points(path)[-1]
    assert last["event"] == "stop"
    checkpoints = path.parent / "runs" / "small-1" / "checkpoints"
    assert (checkpoints / f"step-{last['step']:010}").exists(), "no step is lost by SIGTERM"

    result = pipeline.run(path)
    assert result.curve_sha256 == alone.curve_sha256
    assert result.weights_sha256 == alone.weights_sha256
    assert result.metrics == alone.metrics
    assert result.workers == [1, 1, 1]
    assert result.first_difference is None
    client = mlflow.MlflowClient(result.tracking_uri)
    history = client.get_metric_history(result.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == list(enumerate(result.losses, start=1))
    assert status(path) == "FINISHED"
    assert client.get_run(result.run_id).data.tags["pipeline.workers"] == "1, 1, 1"
    (experiment,) = [e for e in client.search_experiments() if e.name == "small"]
    assert len(client.search_runs([experiment.experiment_id])) == 1


@pytest.mark.ray
def test_a_signal_to_the_whole_process_group_loses_no_step_of_ray_workers(job: Write) -> None:
    """`timeout` and many shells signal the group, and with it what Ray has started."""
    path = job({**LONG, "training.epochs": 100_000, "workers.num": 2})
    process = started(path)
    until_step(path, 60, process)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 128 + signal.SIGTERM, err
    last = points(path)[-1]
    assert last["event"] == "stop"
    assert f"stopped by SIGTERM after step {last['step']}" in err
    assert (path.parent / f"runs/small-1/checkpoints/step-{last['step']:010}").exists()
    assert status(path) == "KILLED"


def test_a_signal_to_the_uploader_too_leaves_the_record_complete(job: Write) -> None:
    """`ray job stop` signals every process that the command has started."""
    path = job({**LONG, "training.epochs": 100_000})
    process = started(path)
    until_step(path, 300, process)
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        os.kill(int(child), signal.SIGTERM)
    code, err = stopped(process, signal.SIGTERM)
    assert code == 128 + signal.SIGTERM, err
    assert "told everything" not in err
    assert status(path) == "KILLED"
    record = json.loads((path.parent / "runs/small-1/recorded.json").read_text())
    client = mlflow.MlflowClient(record["tracking_uri"])
    history = client.get_metric_history(record["run_id"], "train/loss")
    assert [m.step for m in history] == [p["step"] for p in points(path) if "train" in p]


def test_a_closed_terminal_loses_no_step(job: Write) -> None:
    path = job({**LONG, "training.epochs": 100_000})
    ours, its = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "run", str(path)],
        stdin=its, stdout=its, stderr=its, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # not as under `nohup`
    )  # fmt: skip
    os.close(its)
    shown = threading.Thread(target=read_all, args=(ours,), daemon=True)
    shown.start()
    until_step(path, 300, process)
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    try:
        assert process.wait(60) == 128 + signal.SIGHUP
    finally:
        process.kill()
    last = points(path)[-1]
    assert last["event"] == "stop"
    assert (path.parent / f"runs/small-1/checkpoints/step-{last['step']:010}").exists()
    assert status(path) == "KILLED"


def read_all(descriptor: int) -> None:
    with contextlib.suppress(OSError):
        while os.read(descriptor, 1000):
            pass


@pytest.mark.chaos
def test_a_second_command_that_is_stopped_early_names_the_newest_checkpoint(job: Write) -> None:
    """Not the step at which an earlier one was stopped."""
    path = job({**LONG, "training.epochs": 100_000})
    process = started(path)
    until_step(path, 100, process)
    stopped(process, signal.SIGINT)
    process = started(path)
    until_step(path, 600, process)
    stopped(process, signal.SIGKILL)
    folder = path.parent / "runs/small-1"
    newest = max(int(p.name[5:]) for p in (folder / "checkpoints").glob("step-*"))
    happened = _Happened(RunDir(folder))
    assert happened.saved_at().endswith(f"from the checkpoint after step {newest}")
    process = started(path)
    until_step(path, newest + 400, process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    code, err = stopped(process, signal.SIGINT)
    assert code == 130
    saved = sorted(int(p.name[5:]) for p in (folder / "checkpoints").glob("step-*"))
    assert f"after step {saved[-1]}" in err
    assert "recomputed" in err, "and how many steps"


def test_a_signal_after_the_last_step_does_not_undo_the_run(
    job: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While workers and progress are put away, which takes seconds with Ray."""
    path, end = job(), progress.Progress.__exit__

    def told(self: progress.Progress, *error: object) -> None:
        end(self, *error)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(progress.Progress, "__exit__", told)
    result = pipeline.run(path)
    assert result.state == "finished"
    assert status(path) == "FINISHED"
    assert result.model


def test_a_finished_run_is_recorded_whoever_has_the_number_of_its_killed_command(
    job: Write,
) -> None:
    """As in a container, where each command is the first process."""
    path = job()
    result = pipeline.run(path)
    run = RunDir(Path(result.storage))
    run.ended.unlink()
    run.read_recorded().model_copy(update={"complete": False}).write(run.recorded)
    assert Record.read(run.record).launcher.pid == os.getpid()
    assert pipeline.run(path).run_id == result.run_id
    assert status(path) == "FINISHED"


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_ctrl_c_that_also_ends_the_reader_of_its_output(job: Write, closed: str) -> None:
    """As of `pipeline run job.yaml | tee log`."""
    path = job({**LONG, "training.epochs": 100_000})
    process = started(path, "--json")
    until_step(path, 200, process)
    stream = getattr(process, closed)
    stream.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert points(path)[-1]["event"] == "stop"
    assert status(path) == "KILLED"
    for left in (process.stdout, process.stderr):
        assert left
        left.close()


def test_sync_does_not_mistake_another_process_for_the_killed_command(job: Write) -> None:
    """Its number can be another one's by then, as that of the first process of a container."""
    path = job({**LONG, "training.epochs": 100_000})
    process = started(path)
    until_step(path, 100, process)
    run = RunDir(path.parent / "runs/small-1")
    with pytest.raises(UsageError, match="right now, by process"):
        uploading.finish(run.path)
    stopped(process, signal.SIGKILL)
    record = Record.read(run.record)
    launcher = record.launcher.model_copy(update={"pid": os.getpid()})
    record.model_copy(update={"launcher": launcher}).write(run.record)
    uploading.finish(run.path)
    assert status(path) == "FAILED"


def test_job_names_with_the_same_folder_name_are_different_jobs(job: Write) -> None:
    one, two = (Path(pipeline.run(job({"name": name})).storage).name for name in ("a b", "a-b"))
    assert (one[:4], two) == ("a-b-", "a-b-1")
    assert one != two


def test_an_address_that_mlflow_cannot_take_is_refused_before_training(
    job: Write, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "htp://somewhere")
    path = job()
    for name in ("check", "run"):
        code, _, err = command(name, path)
        assert code == 2
        assert "MLFLOW_TRACKING_URI: MLflow knows no htp://" in err
    assert not list(path.parent.glob("runs/small-1"))


def test_a_finished_run_says_so_and_fresh_starts_anew(job: Write, command: Command) -> None:
    path = job()
    code, first, _ = command("run", path, "--json")
    assert code == 0
    code, again, err = command("run", path, "--set", "tracking.experiment=other", "--json")
    assert code == 0
    assert "small-1 is finished already" in err
    one, two = (json.loads(text.splitlines()[-1]) for text in (first, again))
    assert {k: v for k, v in one.items() if k != "first_step_seconds"} == {
        k: v for k, v in two.items() if k != "first_step_seconds"
    }
    code, fresh, _ = command("run", path, "--fresh", "--json")
    other = json.loads(fresh.splitlines()[-1])
    assert code == 0
    assert other["storage"].endswith("small-2")
    assert other["run_id"] != one["run_id"]
    assert other["curve_sha256"] == one["curve_sha256"]
    code, changed, _ = command("run", path, "--set", "training.seed=1", "--json")
    assert code == 0
    assert json.loads(changed.splitlines()[-1])["storage"].endswith("small-3")


def test_an_unfinished_run_is_not_resumed_as_another_job(job: Write, command: Command) -> None:
    path = job(LONG)
    process = started(path)
    until_step(path, 200, process)
    code, _ = stopped(process, signal.SIGINT)
    assert code == 130
    code, _, err = command("run", path, "--set", "optimizer.lr=0.5")
    assert code == 2
    assert "optimizer.lr: 0.01 -> 0.5" in err
    assert "--fresh" in err
    data = path.parent / "data.csv"
    whole = data.read_text()
    data.write_text(whole.replace("1.25", "1.5"))
    code, _, err = command("run", path)
    assert code == 2
    assert "the rows themselves" in err
    data.write_text(whole)
    process = started(path, "--set", "checkpoint.keep=5")
    until_step(path, 400, process)
    code, err = stopped(process, signal.SIGINT)
    assert "resuming from step" in err


def test_of_commands_started_at_once_one_trains_and_the_others_are_refused(job: Write) -> None:
    path = job(LONG)
    together = [started(path) for _ in range(4)]
    deadline = time.monotonic() + 120
    while sum(p.poll() is None for p in together) > 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    refused = [p for p in together if p.poll() is not None]
    (trains,) = [p for p in together if p.poll() is None]
    code, _ = stopped(trains, signal.SIGINT)
    assert code == 130
    assert [p.returncode for p in refused] == [2, 2, 2]
    for process in refused:
        assert "is being trained or recorded right now, by process" in process.communicate()[1]
    assert [p.name for p in path.parent.glob("runs/small-*")] == ["small-1"]


def test_a_second_signal_ends_at_once(job: Write) -> None:
    slow = path_of_slow_job(job)
    process = started(slow, "--import", str(slow.parent / "slow_steps.py"))
    deadline = time.monotonic() + 60
    while not list(slow.parent.glob("runs/small-1/curve.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.5)
    before = time.monotonic()
    code, err = stopped(process, signal.SIGINT)
    assert code == 130, err
    assert time.monotonic() - before < 20, "a step takes a minute"


@pytest.mark.chaos
def test_a_dead_server_is_reported_during_training_and_recording_can_be_interrupted(
    job: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("PIPELINE_UPLOAD_PATIENCE_SECONDS", "100")
    path = job({**LONG, "training.epochs": 6000})
    process = started(path)
    folder = path.parent / "runs" / "small-1"
    deadline = time.monotonic() + 240
    while not (folder / "ended.json").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1)
    code, err = stopped(process, signal.SIGTERM)
    assert code == 3, err
    assert err.count("MLflow cannot be told: MLflow's server does not answer (http://127") == 1
    assert f"pipeline sync {folder}" in err
    assert "Traceback" not in err
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    result = pipeline.run(path)
    assert status(path) == "FINISHED"
    assert len(result.losses) == 18000


def path_of_slow_job(job: Write) -> Path:
    path = job({"loss": "slow_steps"})
    (path.parent / "slow_steps.py").write_text(
        "import threading, time, pipeline\n"
        '@pipeline.losses.register("slow_steps")\n'
        "def slow_steps(prediction, target):\n"
        "    if threading.current_thread().name == 'training' and prediction.requires_grad:\n"
        "        time.sleep(60)\n"
        "    return (prediction - target) ** 2\n"
    )
    return path
