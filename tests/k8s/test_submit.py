"""`pipeline k8s submit` and its like, as commands, against an API server that keeps state."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.kubernetes.rules import Document

from . import schemas
from .conftest import ROOT
from .documents import one
from .fake_api import FakeApi, serving

JOB = str(ROOT / "jobs/diabetes.yaml")
SECONDS = 60
NAME = "diabetes-"
PLATFORM = "/api/v1/namespaces/pipeline/configmaps/platform"
DONE = '{"state": "finished", "run": "diabetes-1"}\n'


@pytest.fixture
def api(crds: schemas.Crds, built: dict[str, list[Document]]) -> Iterator[FakeApi]:
    with serving(crds) as fake:
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


def succeed(api: FakeApi, name: str) -> None:
    api.set(name, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")


def fail(api: FakeApi, name: str, reason: str, message: str = "") -> None:
    api.set(name, jobDeploymentStatus="Failed", jobStatus="FAILED", reason=reason, message=message)


def test_a_run_is_applied_followed_and_told(
    api: FakeApi, command: Callable[..., subprocess.Popen[str]]
) -> None:
    process = command("submit", JOB, "--yes", "--json", "--set", "workers.num=2")
    name = the_run(api, process)
    pod = api.submitter(name, 1, "starting\n", "note  the first line\nnote  and half of a")
    api.set(name, jobDeploymentStatus="Running", jobStatus="RUNNING")
    time.sleep(2)  # the stream ends meanwhile, and the run goes on
    api.logs[pod] += [" line\n", DONE]
    succeed(api, name)
    code, out, err = ended(process)
    assert code == 0, err
    assert json.loads(out) == {"state": "finished", "run": "diabetes-1", "name": name}
    assert err.count("the first line") == 1
    assert "and half of a line" in err
    assert "2 pods of 1, each 1 CPUs, 3Gi; pipeline:0.1.0" in err
    held = api.objects[f"/api/v1/namespaces/pipeline/configmaps/{name}"]
    (owner,) = held["metadata"]["ownerReferences"]
    assert owner["uid"] == api.run(name)["metadata"]["uid"]


def test_the_same_command_attaches_tells_and_resumes(
    api: FakeApi, command: Callable[..., subprocess.Popen[str]]
) -> None:
    detached(command)
    name = the_run(api)
    first = api.run(name)["metadata"]["uid"]
    process = command("submit", JOB)  # nothing to be asked
    api.submitter(name, 1, "note  it trains\n")
    api.set(name, jobDeploymentStatus="Running", jobStatus="RUNNING")
    time.sleep(2)
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
        (("Failed", "FAILED", "DeadlineExceeded", ""), 1, "its deadline; its state is saved"),
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
    labels = {"ray.io/originated-from-cr-name": name}
    api.put(
        "/api/v1/namespaces/pipeline/pods/w",
        {"metadata": {"labels": labels}, "status": {"phase": "Pending", "conditions": [said]}},
    )
    time.sleep(3)
    api.set(name, jobDeploymentStatus="Suspended")  # as Kueue does
    del api.objects["/api/v1/namespaces/pipeline/pods/w"]
    time.sleep(3)
    succeed(api, name)
    code, _, err = ended(process)
    assert code == 0
    assert "waiting for w: 0/3 nodes: insufficient nvidia.com/gpu" in err
    assert f"{name} suspended" in err


def test_a_retry_is_followed_in_its_own_log(
    api: FakeApi, command: Callable[..., subprocess.Popen[str]]
) -> None:
    process = command("submit", JOB, "--yes")
    name = the_run(api, process)
    api.submitter(name, 1, "note  the first attempt\n")
    time.sleep(2)
    api.set(name, jobDeploymentStatus="Retrying", failed=1)
    del api.objects[f"/api/v1/namespaces/pipeline/pods/{name}-1"]
    api.submitter(name, 2, "note  the second attempt\n")
    time.sleep(2)
    succeed(api, name)
    _, _, err = ended(process)
    assert err.index("the first attempt") < err.index("the second attempt")


def test_ctrl_c_leaves_it_running(
    api: FakeApi, command: Callable[..., subprocess.Popen[str]]
) -> None:
    process = command("submit", JOB, "--yes", "--json")
    name = the_run(api, process)
    api.submitter(name, 1, "note  it trains\n")
    time.sleep(3)
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
    api.submitter(name, 1, "note  it trains\n")
    time.sleep(2)
    api.is_down = True
    time.sleep(4)
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
    time.sleep(2)
    del api.objects[f"/apis/ray.io/v1/namespaces/pipeline/rayjobs/{name}"]
    code, _, err = ended(process)
    assert code == 1
    assert f"{name} was deleted; the same command resumes the run" in err


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda api: api.forbidden.add(("PATCH", "rayjobs")), "rayjobs is forbidden"),
        (lambda api: api.objects.pop(PLATFORM), "apply an overlay first"),
        (lambda api: api.objects[PLATFORM]["data"].update(imagge="x"), "imagge: Extra inputs"),
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


def test_another_that_changes_it_at_the_same_time_is_said(
    api: FakeApi, command: Callable[..., subprocess.Popen[str]]
) -> None:
    detached(command)
    name = the_run(api)
    held = api.objects[f"/api/v1/namespaces/pipeline/configmaps/{name}"]
    held["metadata"]["managed"] = "kubectl"
    fail(api, name, "AppFailed")
    code, _, err = ended(command("submit", JOB, "--yes", "--detach"))
    assert (code, "another has changed it" in err) == (2, True), err
    assert api.run(name)["status"]["jobStatus"] == "FAILED"  # it was not deleted


def test_stop_waits_until_it_is_gone_and_its_files_with_it(
    api: FakeApi, command: Callable[..., subprocess.Popen[str]]
) -> None:
    detached(command)
    api.delete_seconds = 2.0
    code, out, err = ended(command("stop", "diabetes"))
    assert code == 0, err
    assert "ended in" in out
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
    api.put(f"{extensions}/rayjobs.ray.io", {"spec": {"schema": schema}})
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
    assert len([path for path in api.objects if "/rayjobs/" in path]) == 1
