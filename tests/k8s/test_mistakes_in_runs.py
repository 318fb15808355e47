"""Mistakes in a run that were made on purpose, each caught by the check that its row names.

A row plants one mistake in documents that pass every check. So a check that no longer looks fails
here, and the rows say what is looked at.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from . import schemas
from .checks import run_checks
from .planting import SECRET, Documents, Plant, mount, put, rename, variable
from .test_mistakes_in_platforms import OF_PLATFORMS


def ray_job(found: Documents) -> Any:
    return next(each for each in found if each["kind"] == "RayJob")


def job(found: Documents) -> Any:
    return ray_job(found)["spec"]


def cluster(found: Documents) -> Any:
    return job(found)["rayClusterSpec"]


def head(found: Documents) -> Any:
    return cluster(found)["headGroupSpec"]["template"]["spec"]


def ray(found: Documents) -> Any:
    return head(found)["containers"][0]


def group(found: Documents) -> Any:
    return cluster(found)["workerGroupSpecs"][0]


def worker(found: Documents) -> Any:
    return group(found)["template"]["spec"]


def trains(found: Documents) -> Any:
    return worker(found)["containers"][0]


def submitter(found: Documents) -> Any:
    return job(found)["submitterPodTemplate"]["spec"]


def files(found: Documents) -> Any:
    return next(each for each in found if each["kind"] == "ConfigMap")


def command(found: Documents, old: str, new: str) -> None:
    text = job(found)["entrypoint"]
    assert old in text
    job(found)["entrypoint"] = text.replace(old, new)


# What is wrong -> (how to plant it, the check that sees it, what its fault says).
OF_RUNS: dict[str, tuple[Plant, str, str]] = {
    "a typo in the job": (
        lambda f: rename(job(f), "backoffLimit", "backofLimit"), "ray schema", "'backofLimit'"),
    "a typo deep in a pod": (
        lambda f: rename(ray(f), "imagePullPolicy", "imagePullPolcy"),
        "ray schema", "'imagePullPolcy'"),
    "replicas as text": (lambda f: put(group(f), replicas="2"), "ray schema", "'2' is not"),
    "a number among start parameters": (
        lambda f: put(group(f)["rayStartParams"], **{"num-cpus": 1}), "ray schema", "1 is not"),
    "a version that is a number": (
        lambda f: put(cluster(f), rayVersion=2.6), "ray schema", "2.6 is not"),
    "a nonsense quantity of memory": (
        lambda f: put(ray(f)["resources"]["limits"], memory="lots"), "ray schema", "'lots'"),
    "a number beyond 32 bits": (
        lambda f: put(job(f), activeDeadlineSeconds=2**31), "ray schema", "maximum"),
    "an unknown authentication": (
        lambda f: put(cluster(f)["authOptions"], mode="tokens"), "ray schema", "'tokens'"),
    "a variable without a name": (
        lambda f: ray(f)["env"].append({"value": "1"}), "ray schema", "'name' is a required"),
    "a pod without containers": (
        lambda f: submitter(f).pop("containers"), "ray schema", "'containers' is a required"),
    "a job without a head": (
        lambda f: cluster(f).pop("headGroupSpec"), "ray schema", "'headGroupSpec' is a required"),
    "an empty field": (lambda f: put(job(f), metadata=None), "ray schema", "None is not"),
    "an unknown kind": (lambda f: put(ray_job(f), kind="RayJobb"), "ray schema", "RayJobb"),
    "an old version of the kind": (
        lambda f: put(ray_job(f), apiVersion="ray.io/v1alpha1"), "ray schema", "v1alpha1"),
    "deletion rules of both kinds": (
        lambda f: put(job(f), deletionStrategy={
            "onSuccess": {"policy": "DeleteCluster"}, "onFailure": {"policy": "DeleteCluster"},
            "deletionRules": [{"policy": "DeleteCluster",
                               "condition": {"jobStatus": "FAILED", "ttlSeconds": 1}}]}),
        "ray schema", "cannot be used together"),
    "a deletion strategy of nothing": (
        lambda f: put(job(f), deletionStrategy={}), "ray schema", "requires either"),
    "a deletion rule of two conditions": (
        lambda f: put(job(f), deletionStrategy={"deletionRules": [{
            "policy": "DeleteCluster",
            "condition": {"jobStatus": "FAILED", "jobDeploymentStatus": "Failed"}}]}),
        "ray schema", "cannot be used together"),
    "a manager that does not exist": (
        lambda f: put(job(f), managedBy="kueue"), "ray schema", "managedBy"),
    "a typo in metadata": (
        lambda f: rename(ray_job(f)["metadata"], "labels", "lables"), "core schema", "'lables'"),
    "a value that is no text": (
        lambda f: put(files(f)["data"], a=1), "core schema", "1 is not"),
    "a name that is too long": (
        lambda f: put(ray_job(f)["metadata"], name="d" * 48), "rules", "1 to 47 characters"),
    "a name that begins with a digit": (
        lambda f: put(ray_job(f)["metadata"], name="9lives"), "rules", "1 to 47 characters"),
    "a submission mode that does not exist": (
        lambda f: put(job(f), submissionMode="K8SJobMode"), "rules", "submissionMode is one of"),
    "a sidecar as submitter": (
        lambda f: put(job(f), submissionMode="SidecarMode"), "rules", "submissionMode is one of"),
    "two commands": (
        lambda f: command(f, "python -m", "true && python -m"), "rules", "one command"),
    "a variable in the command": (
        lambda f: command(f, "--json", "$JSON"), "rules", "one command"),
    "a command that is none": (lambda f: put(job(f), entrypoint=" "), "rules", "one command"),
    "a variable in the environment": (
        lambda f: put(job(f), runtimeEnvYAML="env_vars: {A: $B}"), "rules", "runtimeEnvYAML"),
    "a job that begins suspended and keeps its cluster": (
        lambda f: (put(job(f), suspend=True), job(f).pop("shutdownAfterJobFinishes")),
        "rules", "suspend needs shutdownAfterJobFinishes"),
    "a lifetime without a shutdown": (
        lambda f: job(f).pop("shutdownAfterJobFinishes"), "rules", "ttlSecondsAfterFinished needs"),
    "a lifetime before the end": (
        lambda f: put(job(f), ttlSecondsAfterFinished=-1), "rules", "is not negative"),
    "deletion rules beside a shutdown": (
        lambda f: put(job(f), deletionStrategy={"deletionRules": [{
            "policy": "DeleteCluster", "condition": {"jobStatus": "FAILED"}}]}),
        "rules", "deletionRules and shutdownAfterJobFinishes"),
    "a negative number of retries": (
        lambda f: put(job(f), backoffLimit=-1), "rules", "backoffLimit is not negative"),
    "retries on another's cluster": (
        lambda f: put(job(f), clusterSelector={"ray.io/cluster": "x"}),
        "rules", "backoffLimit and clusterSelector"),
    "retries of an interactive job": (
        lambda f: put(job(f), submissionMode="InteractiveMode"), "rules", "InteractiveMode"),
    "a deadline of nothing": (
        lambda f: put(job(f), preRunningDeadlineSeconds=0), "rules", "deadlines are positive"),
    "a job that may wait for ever": (
        lambda f: job(f).pop("preRunningDeadlineSeconds"), "rules", "are given"),
    "a job that may run for ever": (
        lambda f: job(f).pop("activeDeadlineSeconds"), "rules", "are given"),
    "a wait that is longer than the run": (
        lambda f: put(job(f), preRunningDeadlineSeconds=10**6), "rules", "is shorter than"),
    "an open job API": (
        lambda f: cluster(f)["authOptions"].pop("mode"), "rules", "authOptions.mode is token"),
    "a Ray without tokens": (
        lambda f: put(cluster(f), rayVersion="2.51.0"), "rules", "tokens need 2.52.0"),
    "the operator's own submitter": (
        lambda f: job(f).pop("submitterPodTemplate"), "rules", "submitterPodTemplate is given"),
    "training on the head": (
        lambda f: cluster(f)["headGroupSpec"]["rayStartParams"].pop("num-cpus"),
        "rules", "training stays off it"),
    "a command that takes a worker's CPU": (
        lambda f: put(job(f), entrypointNumCpus=1), "rules", "the command runs on the head"),
    "resources in two places": (
        lambda f: put(group(f), resources={"CPU": "1"}), "rules", "not in both"),
    "labels among start parameters": (
        lambda f: put(group(f)["rayStartParams"], labels="a=b"), "rules", "labels stand in"),
    "a label that Kubernetes does not take": (
        lambda f: put(group(f), labels={"a": "b c"}), "rules", "the syntax of Kubernetes"),
    "more least than most": (
        lambda f: put(group(f), minReplicas=9), "rules", "0 <= minReplicas"),
    "a range without an autoscaler": (
        lambda f: put(group(f), maxReplicas=9), "rules", "needs enableInTreeAutoscaling"),
    "an autoscaler without a range": (
        lambda f: put(cluster(f), enableInTreeAutoscaling=True), "rules", "needs a range"),
    "an autoscaler by hand": (
        lambda f: ray(f)["env"].append({"name": "RAY_enable_autoscaler_v2", "value": "1"}),
        "rules", "by the operator alone"),
    "a token of Kubernetes": (
        lambda f: put(worker(f), automountServiceAccountToken=True), "rules", "no token of"),
    "a group that is suspended": (
        lambda f: put(group(f), suspend=True), "rules", "suspend of a group"),
    "a sidecar before Ray": (
        lambda f: worker(f)["containers"].insert(0, {**trains(f), "name": "sidecar"}),
        "rules", "comes first"),
    "three seconds to save": (
        lambda f: variable(ray(f), "RAY_JOB_STOP_WAIT_TIME_S", None), "rules", "are 30 or more"),
    "a drain that is longer than the grace": (
        lambda f: variable(trains(f), "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "600"),
        "rules", "less than the pod's grace"),
    "the default grace": (
        lambda f: worker(f).pop("terminationGracePeriodSeconds"), "rules", "grace of 30 s"),
    "a head that is waited for longer than the operator does": (
        lambda f: head(f).pop("tolerations"), "rules", "is tolerated for 60 s at most"),
    "a lost node that is waited for": (
        lambda f: put(worker(f)["tolerations"][1], tolerationSeconds=300),
        "rules", "is tolerated for 60 s at most"),
    "a head that ends without a word": (
        lambda f: ray(f).pop("lifecycle"), "rules", "preStop lets the command save"),
    "a container of the submitter without a security context": (
        lambda f: submitter(f)["containers"][0].pop("securityContext"),
        "pod security", "container submitter"),
    "workers whose waiting container may be root": (
        lambda f: trains(f)["securityContext"].pop("capabilities"),
        "pod security", "container wait-gcs-ready"),
    "the host's network": (
        lambda f: put(worker(f), hostNetwork=True), "pod security", "hostNetwork is on"),
    "a host path": (
        lambda f: head(f)["volumes"].append({"name": "x", "hostPath": {"path": "/"}}),
        "pod security", "is a hostPath"),
    "a privileged head": (
        lambda f: put(ray(f)["securityContext"], privileged=True), "pod security", "privileged"),
    "a claim that is not there": (
        lambda f: put(worker(f)["volumes"][-1], persistentVolumeClaim={"claimName": "run"}),
        "references", "no PersistentVolumeClaim 'run'"),
    "a service account that is not there": (
        lambda f: put(head(f), serviceAccountName="rays"), "references", "no ServiceAccount"),
    "files that are not there": (
        lambda f: put(files(f)["metadata"], name="other"), "references", "no ConfigMap"),
    "a mount of no volume": (
        lambda f: put(mount(ray(f), "/runs"), name="runz"), "references", "no volume 'runz'"),
    "a secret that nobody makes": (
        lambda f: put(ray(f), envFrom=[{"secretRef": {"name": "aws"}}]),
        "references", "no Secret 'aws'"),
    "a password in git": (lambda f: f.append(copy.deepcopy(SECRET)), "secrets", "with data"),
    "no /tmp": (
        lambda f: ray(f)["volumeMounts"].remove(mount(ray(f), "/tmp")),
        "containers", "/tmp is not mounted"),
    "a submitter without /tmp": (
        lambda f: put(submitter(f)["containers"][0], volumeMounts=[]),
        "containers", "/tmp is not mounted"),
    "GPUs asked for that are not the limit": (
        lambda f: put(trains(f)["resources"]["requests"], **{"nvidia.com/gpu": "2"}),
        "containers", "nvidia.com/gpu: its limit"),
    "memory that may be oversold": (
        lambda f: put(trains(f)["resources"]["limits"], memory="64Gi"),
        "containers", "memory's limit"),
    "an image without a tag": (lambda f: put(ray(f), image="pipeline"), "containers", "no tag"),
    "a mount twice": (
        lambda f: ray(f)["volumeMounts"].append(dict(mount(ray(f), "/cache"))),
        "containers", "/cache twice"),
    "a variable twice": (
        lambda f: ray(f)["env"].append(dict(ray(f)["env"][0])), "containers", "env: "),
    "a toleration twice": (
        lambda f: worker(f)["tolerations"].append(dict(worker(f)["tolerations"][0])),
        "containers", "tolerations: "),
    "a cache without a limit": (
        lambda f: put(head(f)["volumes"][2], emptyDir={}), "containers", "no sizeLimit"),
    "runs that cannot be written": (
        lambda f: put(mount(trains(f), "/runs"), readOnly=True), "storage", "/runs is read-only"),
    "runs of another user": (
        lambda f: worker(f)["securityContext"].pop("fsGroup"), "storage", "no fsGroup"),
    "a flag that `run` does not have": (
        lambda f: command(f, "--json", "--jason"), "agreement", "--jason"),
    "a command that is not there": (
        lambda f: command(f, "pipeline run", "pipeline train"), "agreement", "no such command"),
    "another program": (
        lambda f: command(f, "python -m pipeline", "pipeline"), "agreement", "not `python -m"),
    "a file that the pod does not have": (
        lambda f: command(f, "job/digits.yaml", "jobs/digits.yaml"),
        "agreement", "is not where the pod has it"),
    "a key that the spec does not have": (
        lambda f: command(f, "workers.num=2", "workers.nun=2"), "agreement", "workers.nun"),
    "a value that the spec does not take": (
        lambda f: command(f, "workers.num=2", "workers.num=two"), "agreement", "workers.num"),
    "a spec with a typo": (
        lambda f: put(files(f)["data"], **{
            "0-digits.yaml": files(f)["data"]["0-digits.yaml"].replace("epochs", "epoch")}),
        "agreement", "epoch"),
    "a file that is left out": (
        lambda f: head(f)["volumes"][0]["configMap"]["items"].pop(0),
        "agreement", "is not where the pod has it"),
    "a custom module that is left out": (
        lambda f: put(job(f), entrypoint=job(f)["entrypoint"] + " --import mine.py"),
        "agreement", "--import mine.py"),
    "more workers than pods": (
        lambda f: command(f, "workers.num=2", "workers.num=3"), "agreement", "not 3 to 3"),
    "fewer workers than pods": (
        lambda f: command(f, "workers.num=2", "workers.num=1"), "agreement", "of which 1"),
    "pods with too few CPUs": (
        lambda f: command(f, "workers.num=2", "workers.num=2 --set workers.cpus_per_worker=2"),
        "agreement", "room for 0"),
    "GPUs that nobody has": (
        lambda f: command(f, "workers.num=2", "workers.num=2 --set workers.gpu=true"),
        "agreement", "room for 0"),
    "GPUs that Ray is not told of": (
        lambda f: [put(trains(f)["resources"][kind], **{"nvidia.com/gpu": "1"})
                   for kind in ("requests", "limits")], "agreement", "num-gpus is not"),
    "a label that no node has": (
        lambda f: command(f, "workers.num=2", "workers.num=2 --set workers.labels.team=blue"),
        "agreement", "not labelled team=blue"),
    "a resource that no node has": (
        lambda f: command(f, "workers.num=2", "workers.num=2 --set workers.resources.licence=1"),
        "agreement", "have no licence"),
    "runs that the workers do not see": (
        lambda f: trains(f)["volumeMounts"].remove(mount(trains(f), "/runs")),
        "agreement", "is not one volume"),
    "runs in a folder of the pod": (
        lambda f: command(f, "storage=/runs", "storage=/tmp/runs"),
        "agreement", "is not one volume"),
    "a start parameter that Ray does not have": (
        lambda f: put(group(f)["rayStartParams"], **{"num-cpu": "1"}), "agreement", "--num-cpu"),
    "a start parameter that Ray cannot read": (
        lambda f: put(group(f)["rayStartParams"], **{"num-cpus": "one"}), "agreement", "one"),
    "an object store that does not fit": (
        lambda f: put(group(f)["rayStartParams"], **{"object-store-memory": str(2**33)}),
        "agreement", "does not fit into /dev/shm"),
    "a server that does not answer to its name": (
        lambda f: variable(ray(f), "MLFLOW_TRACKING_URI", "http://mlflow"),
        "agreement", "not one that the server answers to"),
    "a cache in /tmp": (
        lambda f: variable(trains(f), "PIPELINE_CACHE", "/tmp/cache"), "agreement", "too small"),
    "a command in another folder": (
        lambda f: ray(f).pop("workingDir"), "agreement", "is not where the pod has it"),
    "another namespace": (
        lambda f: put(ray_job(f)["metadata"], namespace="default"),
        "agreement", "another namespace"),
    "an image of elsewhere": (
        lambda f: put(trains(f), image="rayproject/ray:2.60.0"), "agreement", "of the platform"),
    "a hook that is not there": (
        lambda f: put(ray(f), lifecycle={"preStop": {"exec": {"command": [
            "python", "-m", "pipeline.kubernetes.prestop", "90"]}}}), "hook", "not a module"),
    "a hook that outlives the grace": (
        lambda f: put(ray(f), lifecycle={"preStop": {"exec": {"command": [
            "python", "-m", "pipeline.kubernetes.pre_stop", "500"]}}}), "hook", "less time"),
    "pods that lose their label": (
        lambda f: put(group(f)["template"]["metadata"]["labels"],
                      **{"app.kubernetes.io/component": "worker"}),
        "network", "ray does not reach ray"),
    "a submitter that loses its label": (
        lambda f: job(f)["submitterPodTemplate"]["metadata"]["labels"].pop(
            "app.kubernetes.io/component"), "network", "submitter does not reach ray"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", OF_RUNS)
def test_a_mistake_in_a_run_is_caught(
    mistake: str,
    runs: dict[str, tuple[Documents, Documents]],
    crds: schemas.Crds,
    tmp_path: Path,
) -> None:
    plant, check, words = OF_RUNS[mistake]
    run, platform = copy.deepcopy(runs["two workers"])
    plant(run)
    faults = run_checks(run, platform, tmp_path, crds)[check]()
    assert any(words in fault for fault in faults), faults


def test_every_check_of_a_run_sees_some_mistake() -> None:
    assert {check for _, check, _ in OF_RUNS.values()} == run_checks([], [], Path(), {}).keys()
    assert len(OF_PLATFORMS) + len(OF_RUNS) >= 120
