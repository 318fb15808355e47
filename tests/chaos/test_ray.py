"""Real `TorchTrainer` workers on a Ray cluster: they, drivers, nodes and all of it are killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml

import pipeline
from pipeline.launch import ray_trainer
from pipeline.rundir import RunDir
from pipeline.rundir.journal import Reader, curve_sha256
from pipeline.rundir.records import Done, Point
from pipeline.train.assignment import Assignment
from tests.chaos import harness
from tests.clusters import BRAKED, made_cluster, until

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(1200)]
STEPS = 96


class Job:
    """A job of three workers that takes its time, and what an undisturbed run of it gave."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number, self.brake = folder, 0, folder / "brake"
        (folder / "braked_here.py").write_text(BRAKED.replace('"braked"', '"t_braked_here"'))
        tree = harness.spec_of(folder, epochs=24)
        tree |= {
            "model": {"name": "t_braked_here", "brake": str(self.brake)},
            "workers": {"num": 3}, "checkpoint": {"every_steps": 8},
        }  # fmt: skip
        self.path, self.imports = folder / "job.yaml", [str(folder / "braked_here.py")]
        self.path.write_text(yaml.safe_dump(tree))
        alone = {"workers.num": 1, "storage": str(folder / "alone")}
        self.reference = pipeline.run(self.path, alone, self.imports)
        assert self.reference.steps == STEPS
        self.brake.touch()

    def another(self) -> Path:
        """Folder of the next run."""
        self.number += 1
        return self.folder / f"runs-{self.number}" / "chaos-1"

    def started(self, run: Path, address: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline", "run", str(self.path), "--import", *self.imports,
             "--set", f"storage={run.parent}"],
            env=os.environ | {"RAY_ADDRESS": address}, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def reached(self, run: Path, step: int, process: subprocess.Popen[str]) -> None:
        """Wait for that step of the run."""
        reader, seen = Reader(RunDir(run).journal), [0]

        def said() -> bool:
            seen.extend(point["step"] for point in reader.new() if "train" in point)
            return seen[-1] >= step

        until(said, process)

    def ended(self, process: subprocess.Popen[str]) -> None:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err

    def check(self, run: Path, starts: int) -> None:
        """The same bits, and each step once in the one MLflow run."""
        points = list(Reader(RunDir(run).journal).new())
        done = Done.read(RunDir(run).done)
        assert curve_sha256(points) == self.reference.curve_sha256
        assert done.weights_sha256 == self.reference.weights_sha256
        assert done.first_difference is None
        assert done.workers == [3] * starts
        assert self.validation(points) == self.validation(self.reference.curve)
        recorded = RunDir(run).read_recorded()
        client = mlflow.MlflowClient(recorded.tracking_uri)
        (found,) = client.search_runs([recorded.experiment_id])
        assert found.info.status == "FINISHED"
        history = client.get_metric_history(found.info.run_id, "train/loss")
        assert [(m.step, m.value) for m in history] == list(enumerate(self.reference.losses, 1))

    @staticmethod
    def validation(points: Sequence[Point]) -> list[tuple[int, Any]]:
        return [(p["step"], p["validation"]) for p in points if "validation" in p]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("ray"))


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A head with two CPUs, and a node with two."""
    with made_cluster() as made:
        made.second = made.add()
        yield made


@pytest.mark.parametrize("seed", range(10))
def test_two_workers_are_killed(
    job: Job, nodes: Any, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    drawn = random.Random(seed)
    kills = [(drawn.randrange(3), step) for step in sorted(drawn.sample(range(4, STEPS), 2))]
    fit = ray_trainer.fit

    def with_kills(told: Assignment, **rest: Any) -> None:
        fit(replace(told, faults=kills), **rest)

    monkeypatch.setattr(ray_trainer, "fit", with_kills)
    monkeypatch.setenv("RAY_ADDRESS", nodes.address)
    run = job.another()
    pipeline.run(job.path, {"storage": str(run.parent)}, job.imports)
    job.check(run, starts=3)


@pytest.mark.parametrize("seed", range(5))
def test_the_driver_is_killed(job: Job, nodes: Any, seed: int) -> None:
    run, step = job.another(), random.Random(seed).randrange(STEPS - 20)
    process = job.started(run, nodes.address)
    job.reached(run, step, process)
    process.kill()
    process.communicate()
    job.ended(job.started(run, nodes.address))
    job.check(run, starts=2)


@pytest.mark.parametrize("seed", range(3))
def test_the_second_node_is_lost(job: Job, nodes: Any, seed: int) -> None:
    run, step = job.another(), random.Random(seed).randrange(STEPS - 20)
    process = job.started(run, nodes.address)
    job.reached(run, step, process)
    nodes.remove_node(nodes.second, allow_graceful=False)
    nodes.second = nodes.add()
    job.ended(process)
    job.check(run, starts=2)


@pytest.mark.parametrize("seed", range(2))
def test_the_whole_cluster_is_lost(job: Job, seed: int) -> None:
    run, step = job.another(), random.Random(seed).randrange(STEPS - 20)
    with made_cluster() as made:
        made.add()
        process = job.started(run, made.address)
        job.reached(run, step, process)
        for node in made.list_all_nodes():
            node.kill_all_processes(check_alive=False, allow_graceful=False)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    with made_cluster() as made:
        made.add()
        job.ended(job.started(run, made.address))
    job.check(run, starts=2)
