"""A rendered run in containers of the images: head, workers, submitter and MLflow as Kubernetes
and the operator start them, with their limits, volumes and users; and a SIGTERM to each in turn."""

from __future__ import annotations

import contextlib
import json
import secrets
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.kubernetes.manifests import manifests
from pipeline.kubernetes.platform import parse
from pipeline.kubernetes.render import prepare
from pipeline.kubernetes.rules import Document
from pipeline.spec import parse_override
from tests.conftest import rows
from tests.killed import outcome

from . import image, mlflow_pod, operator, pod
from .documents import of_kind, one

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.timeout(1800),  # images are built first
    pytest.mark.skipif(bool(image.unavailable()), reason=image.unavailable()),
]
SECONDS = 300
OWN_JOB = """
name: placed
data: {train: ../tables/rows.csv, validation: 0.2, inputs: [a, b], target: y}
model: {name: mlp, hidden: [32]}
loss: patient
training: {epochs: 700, batch_size: 8, microbatch_size: 4}
workers: {num: 2}
"""
OWN_LOSS = """
import os, time
import pipeline


@pipeline.losses.register("patient")
def patient(prediction, target):
    if "RAY_ADDRESS" in os.environ:  # in a pod: what happens to it has time to happen
        time.sleep(0.05)
    return (prediction - target) ** 2
"""
GRACE_SECONDS = 60


@dataclass
class Trial:
    """A job, its manifests, and where its pods are."""

    job: Path
    overrides: list[str]
    imports: list[str]
    documents: list[Document]
    machines: pod.Machines

    @property
    def folder(self) -> Path:
        """Of the run."""
        return self.machines.volume("runs") / f"{self.job.stem}-1"

    @property
    def pods(self) -> list[Document]:
        (job,) = of_kind(self.documents, "RayJob")
        return operator.expand(job)

    def last_step(self) -> int:
        path = self.folder / "curve.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)

    def await_step(self, step: int, submitter: pod.Running) -> None:
        deadline = time.monotonic() + SECONDS
        while self.last_step() < step:
            assert submitter.is_running(), submitter.log()
            assert time.monotonic() < deadline, submitter.log()
            time.sleep(0.05)

    def undisturbed(self) -> tuple[str, object, str]:
        """What the same job comes to with one command and one process, in the same image."""
        out = self.machines.volume("here")
        sets = [*self.overrides, "storage=/out", "workers.num=1"]
        words = [word for each in sets for word in ("--set", each)]
        words += [word for each in self.imports for word in ("--import", each)]
        places = [self.job.parent, self.job.parents[1] / "tables"]
        image.podman(
            "run", "--rm", "--user=1000:1000", "--network=none", *pod.ulimits(),
            *(f"--volume={place}:{place}:ro" for place in places if place.exists()),
            f"--volume={out}:/out", self.machines.images["pipeline:0.1.0"],
            "pipeline", "run", str(self.job), *words,
        )  # fmt: skip
        return outcome(out / self.folder.name)


Begin = Callable[[Path, list[str], list[str]], Trial]


@pytest.fixture(scope="module")
def images() -> dict[str, str]:
    made = {"pipeline:0.1.0": image.build("run"), "pipeline-mlflow:0.1.0": image.build("mlflow")}
    return made | {"keeper": made["pipeline:0.1.0"]}


@pytest.fixture
def begin(
    built: dict[str, list[Document]], images: dict[str, str], tmp_path: Path
) -> Iterator[Begin]:
    """Makes a trial of a job, overrides and imports, on the platform `local` and its MLflow."""
    settings = one(built["local"], "ConfigMap", "platform")["data"]
    settings = settings | {"grace_seconds": str(GRACE_SECONDS)}
    template = one(built["local"], "Deployment", "mlflow")["spec"]["template"]
    known = {"auth_token": secrets.token_hex(16)}
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(folder.stat().st_mode | 0o011)  # pytest's own are closed to others

    with contextlib.ExitStack() as stack:

        def made(job: Path, overrides: list[str], imports: list[str]) -> Trial:
            values = dict(parse_override(text) for text in overrides)
            platform = parse(settings, "pipeline", "platform")
            documents = manifests(prepare(str(job), overrides, values, imports, platform))
            machines = stack.enter_context(pod.machines(tmp_path, documents, images, known))
            uri = stack.enter_context(mlflow_pod.database(tmp_path, machines.gateway))
            machines.secrets["uri"] = uri
            stack.enter_context(pod.running(template, machines, "mlflow"))
            stack.callback(_show, machines)
            return Trial(job, overrides, imports, documents, machines)

        yield made


def _show(machines: pod.Machines) -> None:
    for name, peak in sorted(machines.peaks.items()):
        print(f"{name}: at most {peak / pod.MIB:,.0f} MiB", file=sys.stderr)


@contextlib.contextmanager
def nodes(trial: Trial) -> Iterator[list[pod.Running]]:
    """A Ray cluster: the head, and two workers."""
    head, worker, _ = trial.pods
    with contextlib.ExitStack() as stack:
        names = (operator.HEAD_FQDN, "cluster-head-svc")
        made = [stack.enter_context(pod.running(head, trial.machines, "head", *names))]
        for number in (1, 2):
            made.append(
                stack.enter_context(pod.running(worker, trial.machines, f"worker-{number}"))
            )
        _await_dashboard(made[0], trial.machines)  # the operator asks it before it submits
        yield made


def _await_dashboard(head: pod.Running, machines: pod.Machines) -> None:
    deadline = time.monotonic() + SECONDS
    request = urllib.request.Request(f"http://{head.address}:8265/api/v0/nodes")
    request.add_header("Authorization", f"Bearer {machines.secrets['auth_token']}")
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5) as answer:
            if answer.read().count(b"ALIVE") >= 3:
                return
        assert head.is_running(), head.log()
        assert time.monotonic() < deadline, head.log()
        time.sleep(0.5)


def submitter(trial: Trial, job_id: str) -> contextlib.AbstractContextManager[pod.Running]:
    """The pod that sends the job to the cluster, or follows it if it was sent before."""
    document = trial.pods[-1]
    (job,) = of_kind(trial.documents, "RayJob")
    document["spec"]["containers"][0]["args"] = [operator.submit_script(job["spec"], job_id)]
    return pod.running(document, trial.machines, "submitter")


def test_digits_trains_in_its_pods_to_the_bits_of_a_laptop(
    begin: Begin,
) -> None:
    overrides = ["workers.num=2", "training.microbatch_size=16"]
    trial = begin(image.ROOT / "jobs/digits.yaml", overrides, [])
    with nodes(trial), submitter(trial, "whole") as follower:
        assert follower.wait(SECONDS) == 0, follower.log()
        assert '"state": "finished"' in follower.log()
    assert outcome(trial.folder) == trial.undisturbed()


def test_each_pod_goes_in_turn_and_no_bit_changes(begin: Begin, tmp_path: Path) -> None:
    """A worker, whose pod is replaced; the submitter, whose retry finds the job training; and all
    pods, as by an eviction or by Kueue, first the head's hook: a new cluster loses no step."""
    files = {"jobs/placed.yaml": OWN_JOB, "jobs/patient.py": OWN_LOSS, "tables/rows.csv": rows()}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    trial = begin(tmp_path / "jobs/placed.yaml", [], [str(tmp_path / "jobs/patient.py")])
    head, worker, _ = trial.pods
    with nodes(trial) as made, submitter(trial, "first") as first:
        trial.await_step(40, first)
        made[1].terminate()
        made[1].wait(GRACE_SECONDS)
        with pod.running(worker, trial.machines, "worker-3") as replaced:
            trial.await_step(trial.last_step() + 40, first)
            first.terminate()
            first.wait(GRACE_SECONDS)
            with submitter(trial, "first") as second:
                trial.await_step(trial.last_step() + 40, second)
                replaced.terminate()
                made[2].terminate()
                hook = head["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
                made[0].execute(hook)
                done = trial.last_step()
                made[0].terminate()
                for each in (replaced, made[2], made[0]):
                    each.wait(GRACE_SECONDS)
    saved = (trial.folder / "checkpoints").iterdir()
    assert max(path.name for path in saved) == f"step-{done:010}"  # nothing is computed again
    with nodes(trial), submitter(trial, "second") as follower:
        assert follower.wait(SECONDS) == 0, follower.log()
    assert outcome(trial.folder) == trial.undisturbed()
