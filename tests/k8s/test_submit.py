"""`pipeline k8s submit` and its like, as commands, against an API server that keeps state."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.kubernetes.client import Kubernetes
from pipeline.kubernetes.manifests import manifests
from pipeline.kubernetes.render import prepare
from pipeline.kubernetes.rules import Document
from pipeline.kubernetes.submit import make_plan, send

from . import schemas
from .conftest import ROOT
from .documents import environment, one, pods
from .fake_api import FakeApi, serving

JOB = str(ROOT / "jobs/diabetes.yaml")
SECONDS = 60
NAME = "diabetes-"
PLATFORM = "/api/v1/namespaces/pipeline/configmaps/platform"
DONE = '{"state": "finished", "run": "diabetes-1"}\n'


@pytest.fixture
def api(crds: schemas.Crds, built: dict[str, list[Document]]) -> Iterator[FakeApi]:
    rules = one(built["local"], "Role", "trainer")["rules"]
    with serving(crds, rules) as fake:
        fake.put(PLATFORM, copy.deepcopy(one(built["local"], "ConfigMap", "platform")))
        yield fake


@pytest.fixture
def command(api: FakeApi, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts a command, which asks the server."""
    own = os.environ | {"KUBECONFIG": str(api.kubeconfig(tmp_path))}

    def started(*words: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline", "k8s", *words], env=own | environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip

    return started


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=SECONDS)
    return process.returncode, out, err


def detached(command: Callable[..., subprocess.Popen[str]]) -> None:
    code, _, err = ended(command("submit", JOB, "--yes", "--detach"))
    assert code == 0, err


def the_run(api: FakeApi, process: subprocess.Popen[str] | None = None) -> str:
    """The name of the one RayJob, once it is there."""
    deadline = time.monotonic() + SECONDS
    while True:
        names = [path.rpartition("/")[2] for path in list(api.objects) if "/rayjobs/" in path]
        if names:
            return names[0]
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def looked(api: FakeApi, process: subprocess.Popen[str], place: str) -> None:
    """Wait until a command has asked for this twice more, so that the first answer is shown."""
    before = len(api.requests)
    deadline = time.monotonic() + SECONDS
    while sum(path.endswith(place) for _, path in api.requests[before:]) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, place
        time.sleep(0.05)


def succeed(api: FakeApi, name: str) -> None:
    api.set(name, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")


def fail(api: FakeApi, name: str, reason: str, message: str = "") -> None:
    api.set(name, jobDeploymentStatus="Failed", jobStatus="FAILED", reason=reason, message=message)


def test_a_run_is_applied_followed_and_told(
    api: FakeApi, command: Callable[..., subprocess.Popen[str]]
) -> None:
    process = command("submit", JOB, "--yes", "--json", "--set", "workers.num=2")
    name = the_run(api, process)
    pod = api.submitter(name, 1, "starting\n", "note  the first line\n", "note  the second\n")
    api.set(name, jobDeploymentStatus="Running", jobStatus="RUNNING")
    looked(api, process, f"{pod}/log")  # the stream ends meanwhile, and the run goes on
    api.logs[pod] += ["note  the third\n", DONE]
    succeed(api, name)
    code, out, err = ended(process)
    assert code == 0, err
    assert json.loads(out) == {"state": "finished", "run": "diabetes-1", "name": name}
    for words in ("the first line", "the second", "the third"):
        assert err.count(words) == 1, err
    assert "workers  2, in 2 pods, each of 1 CPUs and 1536Mi; pipeline:0.1.0" in err
    held = api.objects[f"/api/v1/namespaces/pipeline/configmaps/{name}"]
    (owner,) = held["metadata"]["ownerReferences"]
    assert owner["uid"] == api.run(name)["metadata"]["uid"]


def test_the_clock_submits_a_run_of_its_own_each_time(
    api: FakeApi, built: dict[str, list[Document]], tmp_path: Path
) -> None:
    """The words of the pod, with its variables; the job stands elsewhere here."""
    ((_, pod),) = pods([one(built["elastic"], "CronJob", "scheduled")])
    (container,) = pod["spec"]["containers"]
    (script,) = container["args"]
    own = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    own |= environment(container) | {"KUBECONFIG": str(api.kubeconfig(tmp_path))}
    words = [*container["command"], script.replace("/job/job.yaml", JOB)]
    for tick in ("scheduled-29451480", "scheduled-29451480"):  # tried again: one run
        own["TICK"] = tick
        subprocess.run(words, env=own, check=True, timeout=SECONDS, capture_output=True)
    (name,) = [path.rpartition("/")[2] for path in api.objects if "/rayjobs/" in path]
    assert re.fullmatch("digits-20251230-1000-[0-9a-f]{8}", name)
    entrypoint = api.run(name)["spec"]["entrypoint"]
    assert f"name={name[:-9]}" in entrypoint
    assert "tracking.experiment=digits" in entrypoint


def test_the_same_command_attaches_tells_and_resumes(
    api: FakeApi, command: Callable[..., subprocess.Popen[str]]
) -> None:
    detached(command)
    name = the_run(api)
    first = api.run(name)["metadata"]["uid"]
    process = command("submit", JOB)  # nothing to be asked
    pod = api.submitter(name, 1, "note  it trains\n")
    api.set(name, jobDeploymentStatus="Running", jobStatus="RUNNING")
    looked(api, process, f"{pod}/log")
    fail(api, name, "AppFailed", "Job entrypoint command failed with exit code 1, last logs: x")
    code, _, err = ended(process)
    assert code == 1
    assert f"attaches to {name}" in err
    assert "note  it trains" in err
    code, _, err = ended(command("submit", JOB, "--yes", "--detach"))
    assert code == 0, err
    assert f"resumes {name}" in err
    assert api.run(name)["metadata"]["uid"] != first
    api.submitter(name, 2, DONE)
    succeed(api, name)
    code, out, err = ended(command("submit", JOB, "--json"))
    assert (code, json.loads(out)["state"]) == (0, "finished")
    assert f"shows the result of {name}" in err


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (("Failed", "FAILED", "DeadlineExceeded", ""), 1, "its deadline: its state is being"),
        (("Complete", "STOPPED", "", ""), 143, "it was stopped"),
        (("Failed", "", "PreRunningDeadlineExceeded", ""), 1, "did not come to run in time"),
        (("ValidationFailed", "", "ValidationFailed", "no such mode"), 2, "refuses it: no such"),
        (("Failed", "FAILED", "AppFailed", "failed with exit code 2, last"), 2, ""),
        (("Failed", "FAILED", "AppFailed", "failed with exit code -15, last"), 143, ""),
        (("Failed", "", "JobStatusCheckTimeoutExceeded", ""), 1, "its head was out of reach"),
    ],
)
def test_an_end_has_the_exit_code_of_run_and_its_reason(
    status: tuple[str, str, str, str],
    code: int,
    words: str,
    api: FakeApi,
    command: Callable[..., subprocess.Popen[str]],
) -> None:
    process = command("submit", JOB, "--yes")
    name = the_run(api, process)
    state, job, reason, message = status
    api.set(name, jobDeploymentStatus=state, jobStatus=job, reason=reason, message=message)
    got, _, err = ended(process)
    assert got == code, err
    assert words in err


def test_what_is_waited_for_is_said(
    api: FakeApi, command: Callable[..., subprocess.Popen[str]]
) -> None:
    process = command("submit", JOB, "--yes")
    name = the_run(api, process)
    said = {"reason": "Unschedulable", "message": "0/3 nodes: insufficient nvidia.com/gpu"}
    labels = {"ray.io/cluster": f"{name}-x"}
    api.set(name, jobDeploymentStatus="Initializing", rayClusterName=f"{name}-x")
    api.put(
        "/api/v1/namespaces/pipeline/pods/w",
        {"metadata": {"labels": labels}, "status": {"phase": "Pending", "conditions": [said]}},
    )
    looked(api, process, f"/{name}")
    api.set(name, jobDeploymentStatus="Suspended")  # as Kueue does
    del api.objects["/api/v1/namespaces/pipeline/pods/w"]
    condition = {"type": "ReplicaFailure", "message": "exceeded quota: runs"}
    api.put(
        f"/apis/ray.io/v1/namespaces/pipeline/rayclusters/{name}-x",
        {"status": {"conditions": [condition]}},
    )
    looked(api, process, f"/{name}")
    succeed(api, name)
    code, _, err = ended(process)
    assert code == 0
    assert "waiting for w: 0/3 nodes: insufficient nvidia.com/gpu" in err
    assert "waiting for exceeded quota: runs" in err


def test_a_retry_is_followed_in_its_own_log(
    api: FakeApi, command: Callable[..., subprocess.Popen[str]]
) -> None:
    process = command("submit", JOB, "--yes")
    name = the_run(api, process)
    pod = api.submitter(name, 1, "note  the first attempt\n")
    looked(api, process, f"{pod}/log")
    api.set(name, jobDeploymentStatus="Retrying", failed=1)
    del api.objects[f"/api/v1/namespaces/pipeline/pods/{name}-1"]
    pod = api.submitter(name, 2, "note  the second attempt\n")
    looked(api, process, f"{pod}/log")
    succeed(api, name)
    _, _, err = ended(process)
    assert err.index("the first attempt") < err.index("the second attempt")


def test_a_submitter_that_is_replaced_shows_nothing_twice(
    api: FakeApi, command: Callable[..., subprocess.Popen[str]]
) -> None:
    """Its log begins anew, with the job's lines from the start."""
    process = command("submit", JOB, "--yes")
    name = the_run(api, process)
    pod = api.submitter(name, 1, "note  one\n", "note  two\n", "note  two\n")
    api.set(name, jobDeploymentStatus="Running", jobStatus="RUNNING", jobId="j-1")
    looked(api, process, f"{pod}/log")
    pod = api.submitter(name, 2, "note  one\n", "note  two\n", "note  two\n", "note  three\n")
    looked(api, process, f"{pod}/log")
    api.logs[pod].append(DONE)
    succeed(api, name)
    code, _, err = ended(process)
    assert code == 0, err
    assert [err.count(f"note  {word}") for word in ("one", "two", "three")] == [1, 2, 1], err


def test_ctrl_c_leaves_it_running(
    api: FakeApi, command: Callable[..., subprocess.Popen[str]]
) -> None:
    process = command("submit", JOB, "--yes", "--json")
    name = the_run(api, process)
    pod = api.submitter(name, 1, "note  it trains\n")
    looked(api, process, f"{pod}/log")
    process.send_signal(signal.SIGINT)
    code, out, err = ended(process)
    assert (code, json.loads(out)["state"]) == (0, "detached"), err
    assert f"pipeline k8s stop {name}" in err
    assert api.run(name)


def test_a_cluster_that_is_away_for_a_while_is_asked_again(
    api: FakeApi, command: Callable[..., subprocess.Popen[str]]
) -> None:
    process = command("submit", JOB, "--yes")
    name = the_run(api, process)
    pod = api.submitter(name, 1, "note  it trains\n")
    looked(api, process, f"{pod}/log")
    api.is_down = True
    looked(api, process, f"/{name}")
    api.is_down = False
    succeed(api, name)
    code, _, err = ended(process)
    assert code == 0, err
    assert "asking again" in err
    assert err.count("note  it trains") == 1


def test_one_that_is_deleted_meanwhile_is_said(
    api: FakeApi, command: Callable[..., subprocess.Popen[str]]
) -> None:
    process = command("submit", JOB, "--yes")
    name = the_run(api, process)
    looked(api, process, f"/{name}")
    del api.objects[f"/apis/ray.io/v1/namespaces/pipeline/rayjobs/{name}"]
    code, _, err = ended(process)
    assert code == 1
    assert f"{name} was deleted; the same command resumes the run" in err


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda api: api.forbidden.add(("PATCH", "rayjobs")), "rayjobs is forbidden"),
        (lambda api: api.objects.pop(PLATFORM), "apply an overlay first"),
        (lambda api: api.objects[PLATFORM]["data"].update(imagge="x"), "imagge: unknown"),
        (lambda api: setattr(api, "is_down", True), "127.0.0.1"),
    ],
    ids=["forbidden", "no platform", "wrong settings", "no answer"],
)
def test_a_refusal_is_one_line_and_changes_nothing(
    spoil: Callable[[FakeApi], None],
    words: str,
    api: FakeApi,
    command: Callable[..., subprocess.Popen[str]],
) -> None:
    spoil(api)
    code, _, err = ended(command("submit", JOB, "--yes"))
    assert code == 2, err
    assert words in err
    assert err.count("error:") == 1
    assert "Traceback" not in err
    assert not [path for path in api.objects if "/rayjobs/" in path]


def test_a_wrong_token_and_no_cluster_are_said(
    api: FakeApi, command: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    wrong = api.kubeconfig(tmp_path / "other", token="wrong")
    code, _, err = ended(command("status", KUBECONFIG=str(wrong)))
    assert (code, "does not know us" in err) == (2, True), err
    code, out, err = ended(command("status", KUBECONFIG=str(tmp_path / "none")))
    assert (code, "set KUBECONFIG" in err, out) == (2, True, ""), err


def test_what_kubectl_has_applied_is_taken_over(
    api: FakeApi, command: Callable[..., subprocess.Popen[str]]
) -> None:
    detached(command)
    name = the_run(api)
    held = api.objects[f"/api/v1/namespaces/pipeline/configmaps/{name}"]
    held["metadata"]["managed"] = "kubectl"
    fail(api, name, "AppFailed")
    detached(command)
    assert api.objects[f"/api/v1/namespaces/pipeline/configmaps/{name}"]["metadata"]["managed"] == (
        "pipeline"
    )


def test_stop_waits_until_it_is_gone_and_its_files_with_it(
    api: FakeApi, command: Callable[..., subprocess.Popen[str]]
) -> None:
    detached(command)
    api.delete_seconds = 2.0
    code, out, err = ended(command("stop", "diabetes"))
    assert code == 0, err
    assert "is gone after" in out
    assert not [path for path in api.objects if "diabetes" in path]


def test_status_and_logs_name_what_there_is(
    api: FakeApi, command: Callable[..., subprocess.Popen[str]]
) -> None:
    detached(command)
    name = the_run(api)
    code, _, err = ended(command("logs", "diabetes"))
    assert (code, "has printed nothing yet" in err) == (2, True), err
    api.submitter(name, 1, "note  ä line\n", DONE)
    fail(api, name, "AppFailed", "failed with exit code 1")
    code, out, _ = ended(command("status"))
    assert all(word in out for word in (name, "diabetes", "failed", "exit code 1"))
    code, out, _ = ended(command("status", "diabetes", "--json"))
    assert json.loads(out)["state"] == "Failed"
    code, out, _ = ended(command("logs", name))
    assert out == "note  ä line\n"
    code, _, err = ended(command("status", "nobody"))
    assert (code, "no run of that name" in err) == (2, True)


def test_the_doctor_says_what_is_missing_and_how_to_mend_it(
    api: FakeApi, command: Callable[..., subprocess.Popen[str]], crds: schemas.Crds
) -> None:
    api.put("/version", {"major": "1", "minor": "28+"})
    api.forbidden.add(("DELETE", "rayjobs"))
    code, out, err = ended(command("doctor"))
    assert code == 1, err
    for words in (
        "1.29 or newer", "helm install kuberay-operator", "you may delete rayjobs",
        "kubectl apply -f k8s/base/namespace.yaml",
    ):  # fmt: skip
        assert words in out, out
    api.forbidden.clear()
    api.put("/version", {"major": "1", "minor": "36"})
    schema = crds[("ray.io/v1", "RayJob")]
    extensions = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    api.put(
        f"{extensions}/rayjobs.ray.io",
        {"spec": {"versions": [{"schema": {"openAPIV3Schema": schema}}]}},
    )
    api.put(
        "/apis/apps/v1/namespaces/kuberay-operator/deployments/o", {"status": {"readyReplicas": 1}}
    )
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    api.put("/api/v1/namespaces/pipeline", {"metadata": {"labels": labels}})
    claim = "/api/v1/namespaces/pipeline/persistentvolumeclaims/runs"
    api.put(claim, {"spec": {"accessModes": ["ReadWriteOnce"]}, "status": {"phase": "Bound"}})
    for name in ("a", "b"):
        api.put(f"/api/v1/nodes/{name}", {})
    api.put("/api/v1/namespaces/pipeline/secrets/mlflow-database", {})
    code, out, err = ended(command("doctor"))
    assert code == 1, out
    assert "head and workers on several nodes need ReadWriteMany" in out
    api.objects[claim]["spec"]["accessModes"] = ["ReadWriteMany"]
    code, out, err = ended(command("doctor"))
    assert code == 0, out
    assert "note" in out  # MLflow does not run


def test_two_that_submit_at_once_end_with_one_run(
    api: FakeApi, command: Callable[..., subprocess.Popen[str]]
) -> None:
    both = [command("submit", JOB, "--yes", "--detach") for _ in range(2)]
    threads = [threading.Thread(target=process.wait) for process in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert [process.returncode for process in both] == [0, 0]
    assert "DELETE" not in {method for method, _ in api.requests}


def test_a_run_that_another_has_resumed_meanwhile_is_left_alone(
    api: FakeApi, crds: schemas.Crds, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The plan saw it failed; before the answer to its question, somebody else has resumed it."""
    monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path)))
    cluster = Kubernetes("pipeline")
    run = prepare(JOB, [], {}, [], cluster.platform())
    documents = manifests(run)
    assert send(make_plan(cluster, run, list), documents, 1)
    fail(api, run.name, "AppFailed")
    mine, theirs = (make_plan(cluster, run, list) for _ in range(2))
    assert send(theirs, documents, 1)
    resumed = api.run(run.name)["metadata"]["uid"]
    assert not send(mine, documents, 1)
    assert api.run(run.name)["metadata"]["uid"] == resumed


def test_a_setting_that_does_not_hold_of_what_runs_is_said(
    api: FakeApi, command: Callable[..., subprocess.Popen[str]]
) -> None:
    detached(command)
    code, _, err = ended(command("submit", JOB, "--detach", "--set", "workers.num=2"))
    assert (code, "which holds" in err) == (0, True), err


def test_a_mistake_in_the_data_is_found_before_anything_is_sent(
    api: FakeApi, command: Callable[..., subprocess.Popen[str]]
) -> None:
    code, _, err = ended(command("submit", JOB, "--yes", "--set", "data.target=nonsense"))
    assert (code, "nonsense" in err) == (2, True), err
    assert not [path for path in api.objects if "/rayjobs/" in path]
