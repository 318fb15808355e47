"""A rendered run in real containers of this machine: head, workers and submitter as the operator
starts them, each with its namespaces, volumes and user; and what a SIGTERM to each comes to."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.kubernetes.manifests import manifests
from pipeline.kubernetes.platform import parse
from pipeline.kubernetes.render import prepare
from pipeline.kubernetes.rules import Document
from tests.conftest import rows
from tests.killed import outcome

from . import mlflow_pod, operator, pod
from .documents import environment, of_kind, one

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root makes network namespaces"),
]
SECONDS = 240
JOB = """
name: placed
data: {train: ../tables/rows.csv, validation: 0.2, inputs: [a, b], target: y}
model: {name: mlp, hidden: [32]}
loss: mse
training: {epochs: 400, batch_size: 8, microbatch_size: 4}
workers: {num: 2}
"""


@dataclass
class Trial:
    """A job whose rows travel with it, its manifests, and where its pods are."""

    job: Path
    documents: list[Document]
    machines: pod.Machines

    @property
    def folder(self) -> Path:
        """Of the run."""
        return self.machines.volume("runs") / "placed-1"

    @property
    def pods(self) -> list[Document]:
        (job,) = of_kind(self.documents, "RayJob")
        return operator.expand(job)

    def last_step(self) -> int:
        path = self.folder / "curve.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)

    def await_step(self, step: int, process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + SECONDS
        while self.last_step() < step:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def undisturbed(self) -> tuple[str, object, str]:
        """What the same job comes to with one command on this machine."""
        folder = self.job.parents[1] / "here"
        words = ["run", str(self.job), "--set", f"storage={folder}"]
        subprocess.run([sys.executable, "-m", "pipeline", *words], check=True, capture_output=True)
        return outcome(folder / "placed-1")


@pytest.fixture
def trial(built: dict[str, list[Document]], tmp_path: Path) -> Iterator[Trial]:
    """MLflow is the platform's, on its database."""
    for name in ("jobs", "tables", "mlflow"):
        (tmp_path / name).mkdir()
    job = tmp_path / "jobs" / "placed.yaml"
    job.write_text(JOB)
    (tmp_path / "tables" / "rows.csv").write_text(rows())
    with (
        mlflow_pod.database(tmp_path) as database,
        mlflow_pod.running(built["local"], database, tmp_path / "mlflow") as port,
    ):
        settings = one(built["local"], "ConfigMap", "platform")["data"]
        settings = settings | {"mlflow_uri": f"http://mlflow:{port}", "grace_seconds": "90"}
        platform = parse(settings, "pipeline", "platform")
        documents = manifests(prepare(str(job), [], {}, [], platform))
        with pod.machines(tmp_path, documents) as machines:
            machines.names["mlflow"] = machines.gateway
            yield Trial(job, documents, machines)


@contextlib.contextmanager
def nodes(trial: Trial) -> Iterator[list[pod.Running]]:
    """A Ray cluster: the head, and two workers."""
    machines = trial.machines
    head, worker, _ = trial.pods
    with contextlib.ExitStack() as stack:
        names = {operator.HEAD_FQDN: "", "cluster-head-svc": ""}
        made = [stack.enter_context(pod.running(head, machines, extra=names))]
        _await_head(made[0], machines)  # as `wait-gcs-ready` does
        for number in (1, 2):
            each = pod.running(worker, machines, name=f"worker-{number}")
            made.append(stack.enter_context(each))
        yield made


def _await_head(head: pod.Running, machines: pod.Machines) -> None:
    deadline = time.monotonic() + SECONDS
    request = urllib.request.Request(f"http://{machines.names['head']}:8265/api/v0/nodes")
    request.add_header("Authorization", f"Bearer {machines.token}")
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5) as answer:
            if b"ALIVE" in answer.read():
                return
        assert head.process.poll() is None, head.log.read_text()
        assert time.monotonic() < deadline, head.log.read_text()
        time.sleep(0.5)


@contextlib.contextmanager
def submitted(trial: Trial, job_id: str) -> Iterator[subprocess.Popen[str]]:
    """The submitter's script, from this machine."""
    machines = trial.machines
    (job,) = of_kind(trial.documents, "RayJob")
    script = operator.submit_script(job["spec"], job_id)
    script = script.replace("http://head:", f"http://{machines.names['head']}:")
    own = environment(trial.pods[-1]["spec"]["containers"][0])
    own |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": machines.token, "HOME": "/nonexistent"}
    own["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    process = subprocess.Popen(
        ["bash", "-ce", script], env=os.environ | own, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_run_trains_in_its_pods_to_the_bits_of_a_laptop(trial: Trial) -> None:
    with nodes(trial), submitted(trial, "whole") as process:
        out, _ = process.communicate(timeout=SECONDS)
        assert '"state": "finished"' in out, out
    assert outcome(trial.folder) == trial.undisturbed()


def test_the_head_goes_and_a_new_cluster_resumes_without_a_step_lost(trial: Trial) -> None:
    """Deleted, as by an eviction: the hook first, then the signal, to it and to the workers."""
    head = trial.pods[0]["spec"]["containers"][0]
    with nodes(trial) as made, submitted(trial, "first") as process:
        trial.await_step(40, process)
        for worker in made[1:]:
            worker.terminate()  # as all pods of the cluster get it
        made[0].execute(head["lifecycle"]["preStop"]["exec"]["command"])
        done = trial.last_step()
        made[0].terminate()
        for each in made:
            each.wait(90)
    saved = (trial.folder / "checkpoints").iterdir()
    assert max(path.name for path in saved) == f"step-{done:010}"  # nothing is computed again
    with nodes(trial), submitted(trial, "second") as process:
        out, _ = process.communicate(timeout=SECONDS)
    assert outcome(trial.folder) == trial.undisturbed(), out
