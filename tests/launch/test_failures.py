"""Ray workers that die are replaced; workers that fail by themselves are not tried again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest

import pipeline
from pipeline.errors import NonFiniteError, RunError
from pipeline.launch import ray_trainer
from pipeline.train.assignment import Assignment
from tests.conftest import JOBS, Write, happened

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture
def kills(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Ranks and steps at which workers are killed, to be filled by the test."""
    planned: list[tuple[int, int]] = []
    fit = ray_trainer.fit

    def with_kills(told: Assignment, **rest: Any) -> None:
        fit(replace(told, faults=planned), **rest)

    monkeypatch.setattr(ray_trainer, "fit", with_kills)
    return planned


def starts(storage: Path) -> list[int]:
    (folder,) = storage.glob("*-1")
    return [event["step"] for event in happened(folder, "start")]


@pytest.mark.ray
def test_a_run_whose_workers_are_killed_ends_with_the_same_bits_recorded_once(
    kills: list[tuple[int, int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"training.microbatch_size": 1, "checkpoint.every_steps": 10}
    alone = pipeline.run(JOBS / "linear.yaml", changes | {"storage": str(tmp_path / "alone")})
    kills[:] = [(1, 25), (0, 61)]
    killed = pipeline.run(
        JOBS / "linear.yaml",
        changes | {"workers.num": 3, "storage": str(tmp_path / "killed")},
    )
    assert killed.curve_sha256 == alone.curve_sha256
    assert killed.weights_sha256 == alone.weights_sha256
    assert killed.workers == [3, 3, 3]
    assert killed.first_difference is None
    first, second, third = starts(tmp_path / "killed")
    assert (first, second) == (0, 20)
    assert third in (50, 60), "that of step 60 may still have been on its way to the disk"
    client = mlflow.MlflowClient(killed.tracking_uri)
    history = client.get_metric_history(killed.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == list(enumerate(killed.losses, start=1))
    assert client.get_run(killed.run_id).data.tags["pipeline.workers"] == "3, 3, 3"
    err = capsys.readouterr().err
    assert "resuming from step 20 with 3 workers (attempt 2)" in err
    assert "A worker died" not in err, "Ray's own words are long and say less"


@pytest.mark.ray
def test_an_error_of_the_run_itself_is_raised_and_not_tried_again(
    job: Write, tmp_path: Path
) -> None:
    path = job({"optimizer": {"name": "sgd", "lr": 1e20}, "workers.num": 3, "training.epochs": 9})
    with pytest.raises(NonFiniteError, match="step"):
        pipeline.run(path)
    assert starts(tmp_path / "runs") == [0]


@pytest.mark.ray
def test_workers_that_die_again_and_again_end_the_run(
    job: Write, tmp_path: Path, kills: list[tuple[int, int]]
) -> None:
    own = tmp_path / "deadly.py"
    own.write_text(
        "import os, signal, pipeline\n"
        '@pipeline.losses.register("deadly")\n'
        "def deadly(prediction, target):\n"
        "    if prediction.requires_grad and os.environ.get('RAY_JOB_ID'):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return (prediction - target) ** 2\n"
    )
    path = job({"loss": "deadly", "workers.num": 2})
    with pytest.raises(RunError, match="workers died 3 times after step 0"):
        pipeline.run(path, imports=[str(own)])
    record = json.loads(next((tmp_path / "runs").glob("small-*/recorded.json")).read_text())
    run = mlflow.MlflowClient(record["tracking_uri"]).get_run(record["run_id"])
    assert run.info.status == "FAILED"


@pytest.mark.ray
@pytest.mark.chaos
def test_a_worker_that_hangs_is_replaced_and_the_run_resumes_with_the_same_bits(
    job: Write, tmp_path: Path
) -> None:
    own = tmp_path / "hanging.py"
    own.write_text(
        "import os, signal, pathlib, pipeline\n"
        "import torch.distributed as dist\n"
        '@pipeline.losses.register("hanging")\n'
        "def hanging(prediction, target, *, marks: str):\n"
        "    mark, rank = pathlib.Path(marks), dist.is_initialized() and dist.get_rank()\n"
        "    if rank == 2 and len(list(mark.iterdir())) < 12:\n"
        "        (mark / str(len(list(mark.iterdir())))).touch()\n"
        "        if len(list(mark.iterdir())) == 12:\n"
        "            os.kill(os.getpid(), signal.SIGSTOP)\n"
        "    return (prediction - target) ** 2\n"
    )
    marks = tmp_path / "marks"
    marks.mkdir()
    path = job({
        "loss": {"name": "hanging", "marks": str(marks)},
        "training": {"epochs": 4, "batch_size": 8, "microbatch_size": 2},
        "checkpoint.every_steps": 2, "workers.timeout_seconds": 10,
    })  # fmt: skip
    alone = pipeline.run(path, {"storage": str(tmp_path / "alone")}, [str(own)])
    hung = pipeline.run(path, {"workers.num": 3}, [str(own)])
    assert hung.workers == [3, 3]
    assert hung.curve_sha256 == alone.curve_sha256
    assert hung.weights_sha256 == alone.weights_sha256
