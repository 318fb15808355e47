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
from pathlib import Path

import pytest

from pipeline.kubernetes.manifests import manifests
from pipeline.kubernetes.platform import parse
from pipeline.kubernetes.render import prepare
from pipeline.kubernetes.rules import Document
from pipeline.spec import parse_override
from tests.killed import outcome

from . import mlflow_pod, operator, pod
from .conftest import ROOT
from .documents import environment, of_kind, one

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root makes network namespaces"),
]
SECONDS = 240
SETTINGS = ["workers.num=2", "training.epochs=4", "training.microbatch_size=8"]
"""Of the run that is disturbed, and of the one that is not."""


@pytest.fixture
def run(
    built: dict[str, list[Document]], tmp_path: Path
) -> Iterator[tuple[list[Document], pod.Machines]]:
    """Manifests of a run, and where its pods are; MLflow is the platform's, on its database."""
    folder = tmp_path / "mlflow"
    folder.mkdir()
    with (
        mlflow_pod.database(tmp_path) as database,
        mlflow_pod.running(built["local"], database, folder) as port,
    ):
        settings = one(built["local"], "ConfigMap", "platform")["data"]
        settings = settings | {"mlflow_uri": f"http://mlflow:{port}", "grace_seconds": "90"}
        platform = parse(settings, "pipeline", "platform")
        values = dict(parse_override(text) for text in SETTINGS)
        job = str(ROOT / "jobs/digits.yaml")
        documents = manifests(prepare(job, SETTINGS, values, [], platform))
        with pod.machines(tmp_path, documents) as machines:
            machines.names["mlflow"] = machines.gateway
            yield documents, machines


@contextlib.contextmanager
def nodes(run: tuple[list[Document], pod.Machines]) -> Iterator[list[pod.Running]]:
    """A Ray cluster: the head, and two workers."""
    documents, machines = run
    (job,) = of_kind(documents, "RayJob")
    head, worker, _ = operator.expand(job)
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
def submitted(
    run: tuple[list[Document], pod.Machines], job_id: str
) -> Iterator[subprocess.Popen[str]]:
    """The submitter's script, from this machine."""
    documents, machines = run
    (job,) = of_kind(documents, "RayJob")
    script = operator.submit_script(job["spec"], job_id)
    script = script.replace("http://head:", f"http://{machines.names['head']}:")
    own = environment(operator.expand(job)[-1]["spec"]["containers"][0])
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


def undisturbed(folder: Path) -> tuple[str, object, str]:
    """What the same job comes to with one command on this machine."""
    words = [word for text in SETTINGS for word in ("--set", text)]
    subprocess.run(
        [sys.executable, "-m", "pipeline", "run", ROOT / "jobs/digits.yaml", *words,
         "--set", f"storage={folder}"], check=True, cwd=folder.parent, capture_output=True,
    )  # fmt: skip
    return outcome(folder / "digits-1")


def last_step(machines: pod.Machines) -> int:
    path = machines.volume("runs") / "digits-1" / "curve.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def await_step(machines: pod.Machines, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + SECONDS
    while last_step(machines) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_trains_in_its_pods_to_the_bits_of_a_laptop(
    run: tuple[list[Document], pod.Machines], tmp_path: Path
) -> None:
    _, machines = run
    with nodes(run), submitted(run, "whole") as process:
        out, _ = process.communicate(timeout=SECONDS)
        assert "succeeded" in out or '"state": "finished"' in out, out
    assert outcome(machines.volume("runs") / "digits-1") == undisturbed(tmp_path / "here")


def test_the_head_goes_and_a_new_cluster_resumes_without_a_step_lost(
    run: tuple[list[Document], pod.Machines], tmp_path: Path
) -> None:
    """Deleted, as by an eviction: the hook first, then the signal, to it and to the workers."""
    documents, machines = run
    (job,) = of_kind(documents, "RayJob")
    head = operator.expand(job)[0]["spec"]["containers"][0]
    with nodes(run) as made, submitted(run, "first") as process:
        await_step(machines, 40, process)
        for worker in made[1:]:
            worker.terminate()  # as all pods of the cluster get it
        made[0].execute(head["lifecycle"]["preStop"]["exec"]["command"])
        done = last_step(machines)
        made[0].terminate()
        for one_of_them in made:
            one_of_them.wait(90)
    saved = (machines.volume("runs") / "digits-1" / "checkpoints").iterdir()
    assert max(path.name for path in saved) == f"step-{done:010}"  # nothing is computed again
    with nodes(run), submitted(run, "second") as process:
        out, _ = process.communicate(timeout=SECONDS)
    assert outcome(machines.volume("runs") / "digits-1") == undisturbed(tmp_path / "here"), out
