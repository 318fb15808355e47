"""Mistakes in a platform that were made on purpose, each caught by the check that its row names.

A row plants one mistake in documents that pass every check. So a check that no longer looks fails
here, and the rows say what is looked at.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest

from .checks import platform_checks
from .documents import one
from .planting import SECRET, Documents, Plant, mount, put, rename, variable


def mlflow(found: Documents) -> Any:
    return one(found, "Deployment", "mlflow")["spec"]


def server(found: Documents) -> Any:
    return mlflow(found)["template"]["spec"]["containers"][0]


def upgrade(found: Documents) -> Any:
    return mlflow(found)["template"]["spec"]["initContainers"][0]


def policy(found: Documents, name: str) -> Any:
    return one(found, "NetworkPolicy", name)["spec"]


def service(found: Documents) -> Any:
    return one(found, "Service", "mlflow")["spec"]


def argument(found: Documents, old: str, new: str) -> None:
    args = server(found)["args"]
    args[args.index(old)] = new


def schedule(found: Documents) -> Any:
    return one(found, "CronJob", "scheduled")["spec"]


def scheduled(found: Documents) -> Any:
    """The pod that the clock starts."""
    return schedule(found)["jobTemplate"]["spec"]["template"]["spec"]


def backend(found: Documents) -> Any:
    """The Service that the page leads to."""
    (rule,) = one(found, "Ingress", "mlflow")["spec"]["rules"]
    return rule["http"]["paths"][0]["backend"]["service"]


def endpoint(found: Documents) -> Any:
    return one(found, "PodMonitor", "ray")["spec"]["podMetricsEndpoints"][0]


def submits(found: Documents, old: str, new: str) -> None:
    """Another command of it."""
    (container,) = scheduled(found)["containers"]
    assert old in container["args"][0]
    container["args"] = [container["args"][0].replace(old, new)]


HOSTS = "MLFLOW_SERVER_ALLOWED_HOSTS"

# What is wrong -> (how to plant it, the check that sees it, what its fault says).
OF_PLATFORMS: dict[str, tuple[Plant, str, str]] = {
    "a typo in a deployment": (
        lambda f: rename(mlflow(f), "replicas", "replica"), "core schema", "'replica' was"),
    "a typo in a network policy": (
        lambda f: rename(policy(f, "submitter"), "policyTypes", "policyType"),
        "core schema", "'policyType' was"),
    "a typo in a probe": (
        lambda f: rename(server(f)["startupProbe"], "failureThreshold", "failureTreshold"),
        "core schema", "'failureTreshold' was"),
    "replicas as text": (lambda f: put(mlflow(f), replicas="1"), "core schema", "'1' is not"),
    "a number as a variable's value": (
        lambda f: server(f)["env"].append({"name": "A", "value": 1}), "core schema", "1 is not"),
    "an unknown kind": (
        lambda f: put(one(f, "Service", "mlflow"), kind="Servise"), "core schema", "Servise"),
    "a kind in the wrong group": (
        lambda f: put(one(f, "Deployment", "mlflow"), apiVersion="apps/v2"),
        "core schema", "apps/v2"),
    "a service without ports": (
        lambda f: (service(f).pop("ports") and None) or put(service(f), ports=[{}]),
        "core schema", "'port' is a required"),
    "a namespace that only warns": (
        lambda f: one(f, "Namespace", "pipeline")["metadata"]["labels"].pop(
            "pod-security.kubernetes.io/enforce"), "namespace", "enforce is not restricted"),
    "a weaker pod security": (
        lambda f: put(one(f, "Namespace", "pipeline")["metadata"]["labels"],
                      **{"pod-security.kubernetes.io/enforce": "baseline"}),
        "namespace", "enforce is not restricted"),
    "an object in another namespace": (
        lambda f: put(one(f, "Service", "mlflow")["metadata"], namespace="default"),
        "namespace", "in the namespace default"),
    "an object twice": (
        lambda f: f.append(copy.deepcopy(one(f, "Service", "mlflow"))), "namespace", "twice"),
    "a pod without the common label": (
        lambda f: mlflow(f)["template"]["metadata"]["labels"].pop("app.kubernetes.io/part-of"),
        "namespace", "without the common label"),
    "an init container without a security context": (
        lambda f: upgrade(f).pop("securityContext"), "pod security", "do not drop ALL"),
    "a server that may write to its root": (
        lambda f: server(f)["securityContext"].pop("readOnlyRootFilesystem"),
        "pod security", "readOnlyRootFilesystem"),
    "a server that may gain privileges": (
        lambda f: put(server(f)["securityContext"], allowPrivilegeEscalation=True),
        "pod security", "allowPrivilegeEscalation"),
    "a pod without seccomp": (
        lambda f: mlflow(f)["template"]["spec"]["securityContext"].pop("seccompProfile"),
        "pod security", "seccompProfile"),
    "a pod that may be root": (
        lambda f: mlflow(f)["template"]["spec"]["securityContext"].pop("runAsNonRoot"),
        "pod security", "runAsNonRoot"),
    "a host path": (
        lambda f: mlflow(f)["template"]["spec"]["volumes"].append(
            {"name": "x", "hostPath": {"path": "/"}}), "pod security", "is a hostPath"),
    "a host port": (
        lambda f: put(server(f)["ports"][0], hostPort=5000), "pod security", "hostPort"),
    "a secret that nobody makes": (
        lambda f: put(upgrade(f)["env"][0]["valueFrom"]["secretKeyRef"], name="mlflow-db"),
        "references", "no Secret 'mlflow-db'"),
    "a key that the secret does not have": (
        lambda f: put(upgrade(f)["env"][0]["valueFrom"]["secretKeyRef"], key="url"),
        "references", "no key 'url'"),
    "a service account that is not there": (
        lambda f: put(mlflow(f)["template"]["spec"], serviceAccountName="mlflo"),
        "references", "no ServiceAccount 'mlflo'"),
    "a claim that is not there": (
        lambda f: f.remove(one(f, "PersistentVolumeClaim", "mlflow-artifacts")),
        "references", "no PersistentVolumeClaim 'mlflow-artifacts'"),
    "a mount of no volume": (
        lambda f: put(mount(server(f), "/artifacts"), name="artefacts"),
        "references", "no volume 'artefacts'"),
    "a password in git": (lambda f: f.append(copy.deepcopy(SECRET)), "secrets", "with data"),
    "a service that selects nothing": (
        lambda f: put(service(f)["selector"], **{"app.kubernetes.io/component": "mlflo"}),
        "selection", "selects no pod"),
    "a service to a closed port": (
        lambda f: put(service(f)["ports"][0], targetPort=5001), "selection", "port 5001"),
    "a budget that selects nothing": (
        lambda f: put(one(f, "PodDisruptionBudget", "mlflow")["spec"]["selector"],
                      matchLabels={"app": "mlflow"}), "selection", "selects no pod"),
    "a policy that selects nothing": (
        lambda f: put(policy(f, "mlflow"), podSelector={"matchLabels": {"app": "mlflow"}}),
        "selection", "selects no pod"),
    "an image without a tag": (lambda f: put(server(f), image="mlflow"), "containers", "no tag"),
    "the latest image": (
        lambda f: put(server(f), image="mlflow:latest"), "containers", "`latest`"),
    "no limit of memory": (
        lambda f: server(f)["resources"].pop("limits"), "containers", "memory's limit"),
    "a limit of memory above the request": (
        lambda f: put(server(f)["resources"], limits={"memory": "8Gi"}),
        "containers", "memory's limit"),
    "no request of CPU": (
        lambda f: server(f)["resources"]["requests"].pop("cpu"), "containers", "no request of cpu"),
    "a nonsense quantity": (
        lambda f: put(server(f)["resources"]["requests"], cpu="banana"), "containers", "banana"),
    "a root file system and no /tmp": (
        lambda f: server(f)["volumeMounts"].remove(mount(server(f), "/tmp")),
        "containers", "/tmp is not mounted"),
    "two mounts at one place": (
        lambda f: server(f)["volumeMounts"].append(dict(mount(server(f), "/tmp"))),
        "containers", "volumeMounts: /tmp twice"),
    "a variable twice": (
        lambda f: server(f)["env"].append(dict(server(f)["env"][-1])), "containers", "env: "),
    "a volume twice": (
        lambda f: mlflow(f)["template"]["spec"]["volumes"].append(
            {"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}}), "containers", "volumes: tmp twice"),
    "a folder without a limit": (
        lambda f: put(mlflow(f)["template"]["spec"]["volumes"][0], emptyDir={}),
        "containers", "no sizeLimit"),
    "a probe of a port that is not there": (
        lambda f: put(server(f)["livenessProbe"]["httpGet"], port="web"),
        "containers", "no port 'web'"),
    "two servers on one volume": (
        lambda f: put(mlflow(f), replicas=2), "storage", "two would share"),
    "a rolling update on one volume": (
        lambda f: put(mlflow(f), strategy={"type": "RollingUpdate"}), "storage", "Recreate"),
    "a volume that the user may not write to": (
        lambda f: mlflow(f)["template"]["spec"]["securityContext"].pop("fsGroup"),
        "storage", "no fsGroup"),
    "a read-only folder of artifacts": (
        lambda f: put(mount(server(f), "/artifacts"), readOnly=True), "storage", "is read-only"),
    "a volume without a size": (
        lambda f: put(one(f, "PersistentVolumeClaim", "runs")["spec"]["resources"]["requests"],
                      storage="much"), "storage", "is not a size"),
    "a flag that mlflow does not have": (
        lambda f: argument(f, "--workers=1", "--worker=1"), "mlflow", "--worker"),
    "a subcommand that mlflow does not have": (
        lambda f: put(server(f), command=["mlflow", "serve"]), "mlflow", "serve"),
    "another program": (
        lambda f: put(server(f), command=["mlflw", "server"]), "mlflow", "no such program"),
    "an upgrade of nothing": (lambda f: upgrade(f)["command"].pop(), "mlflow", "URL"),
    "a server on a port that is closed": (
        lambda f: argument(f, "--port=5000", "--port=5001"), "mlflow", "listens on 5001"),
    "a server on its own address": (
        lambda f: argument(f, "--host=0.0.0.0", "--host=127.0.0.1"), "mlflow", "one address"),
    "a probe that asks for a password": (
        lambda f: put(server(f)["readinessProbe"]["httpGet"], path="/"), "mlflow", "/health"),
    "too little time to start": (
        lambda f: put(server(f)["startupProbe"], failureThreshold=5), "mlflow", "three minutes"),
    "no start-up probe": (lambda f: server(f).pop("startupProbe"), "mlflow", "startupProbe"),
    "any host": (lambda f: variable(server(f), HOSTS, "*"), "mlflow", "answers to the host"),
    "hosts of all domains": (
        lambda f: variable(server(f), HOSTS, "mlflow:5000,mlflow.*"), "mlflow", "answers to"),
    "no host but its own": (
        lambda f: variable(server(f), HOSTS, "localhost:5000"), "mlflow", "refuses the host"),
    "a port-forward that is refused": (
        lambda f: variable(server(f), HOSTS, "mlflow:5000,localhost:*"),
        "mlflow", "refuses the host 127.0.0.1:5000"),
    "jobs beside tracking": (
        lambda f: variable(server(f), "MLFLOW_SERVER_ENABLE_JOB_EXECUTION", None),
        "mlflow", "doubles its memory"),
    "no policy that denies": (
        lambda f: f.remove(one(f, "NetworkPolicy", "default-deny")), "network", "denies all"),
    "a denial of what comes in alone": (
        lambda f: put(policy(f, "default-deny"), policyTypes=["Ingress"]), "network", "denies all"),
    "a denial of what goes out alone": (
        lambda f: put(policy(f, "default-deny"), policyTypes=["Egress"]), "network", "stranger:80"),
    "no names": (
        lambda f: f.remove(one(f, "NetworkPolicy", "dns")), "network", "does not reach dns"),
    "names by TCP alone": (
        lambda f: policy(f, "dns")["egress"][0]["ports"].pop(0), "network", "does not reach dns"),
    "an operator that is left out": (
        lambda f: policy(f, "ray")["ingress"][1]["from"].pop(), "network", "operator does not"),
    "an operator of another namespace": (
        lambda f: put(policy(f, "ray")["ingress"][1]["from"][1], namespaceSelector={}),
        "network", "elsewhere reaches ray:8265"),
    "an operator on all ports": (
        lambda f: policy(f, "ray")["ingress"][1].pop("ports"), "network", "operator reaches"),
    "nodes of Ray apart": (
        lambda f: put(policy(f, "ray")["ingress"][0], ports=[{"protocol": "TCP", "port": 6379}]),
        "network", "ray does not reach ray:41234"),
    "an open MLflow": (
        lambda f: policy(f, "mlflow")["ingress"][0].pop("from"), "network", "reaches mlflow:5000"),
    "an MLflow that runs do not reach": (
        lambda f: put(policy(f, "mlflow")["ingress"][0]["ports"][0], port=5001),
        "network", "ray does not reach mlflow"),
    "an open database": (
        lambda f: policy(f, "postgres")["ingress"][0].pop("from"),
        "network", "reaches postgres:5432"),
    "a database that MLflow does not reach": (
        lambda f: f.remove(one(f, "NetworkPolicy", "mlflow-to-postgres")),
        "network", "mlflow does not reach postgres"),
    "a way out to everywhere": (
        lambda f: put(policy(f, "ray-to-the-internet")["egress"][0]["to"][0]["ipBlock"],
                      **{"except": []}), "network", "reaches 192.168.7.7"),
    "a way out by every port": (
        lambda f: (policy(f, "ray-to-the-internet")["egress"][0].pop("ports"),
                   put(policy(f, "ray-to-the-internet")["egress"][0]["to"][0]["ipBlock"],
                       **{"except": ["10.0.0.0/8"]})), "network", "reaches 169.254.169.254"),
    "MLflow without its label": (
        lambda f: put(mlflow(f)["template"]["metadata"]["labels"],
                      **{"app.kubernetes.io/component": "tracking"}),
        "network", "ray does not reach mlflow"),
}  # fmt: skip

# The same, of what the clock starts.
OF_SCHEDULES: dict[str, tuple[Plant, str, str]] = {
    "a typo in a schedule": (
        lambda f: rename(schedule(f), "timeZone", "timezone"), "core schema", "'timezone' was"),
    "four fields": (lambda f: put(schedule(f), schedule="0 2 * *"), "schedule", "is no schedule"),
    "two at a time": (
        lambda f: schedule(f).pop("concurrencyPolicy"), "schedule", "beside the next"),
    "an unknown flag": (lambda f: submits(f, "--yes", "--sure"), "schedule", "--sure"),
    "a question": (lambda f: submits(f, "--yes", ""), "schedule", "nobody is there"),
    "one name for all": (
        lambda f: submits(f, "TICK##*-", "TICK%%-*"), "schedule", "second one"),
    "a job elsewhere": (
        lambda f: submits(f, "/job/job.yaml", "/jobs/job.yaml"), "schedule", "in no volume"),
    "files that nobody makes": (
        lambda f: put(scheduled(f)["volumes"][0]["configMap"], name="jobs"),
        "references", "no ConfigMap 'jobs'"),
    "nothing that it may": (
        lambda f: f.remove(one(f, "RoleBinding", "scheduler")), "schedule", "may not do"),
    "no token": (
        lambda f: put(one(f, "ServiceAccount", "scheduler"), automountServiceAccountToken=False),
        "schedule", "may not do"),
    "no service account": (
        lambda f: scheduled(f).pop("serviceAccountName"), "schedule", "may not do"),
    "a root that is written to": (
        lambda f: put(scheduled(f)["containers"][0]["securityContext"],
                      readOnlyRootFilesystem=False), "pod security", "readOnlyRootFilesystem"),
    "no way to the API server": (
        lambda f: f.remove(one(f, "NetworkPolicy", "scheduler")),
        "network", "scheduler does not reach 10.30.0.1"),
    "no place for temporary files": (
        lambda f: scheduled(f)["containers"][0]["volumeMounts"].pop(), "containers", "/tmp"),
}  # fmt: skip
OF_PRODUCTION: dict[str, tuple[Plant, str, str]] = {
    "images that the registry does not give": (
        lambda f: one(f, "ServiceAccount", "mlflow").pop("imagePullSecrets"),
        "references", "pulls its images without ['registry']"),
    "a page that leads nowhere": (
        lambda f: put(backend(f), name="mlflo"), "references", "no Service 'mlflo'"),
    "a page behind a port that is not there": (
        lambda f: put(backend(f)["port"], name="https"), "references", "no port 'https'"),
    "a monitor of another port": (
        lambda f: put(endpoint(f), port="metric"), "references", "open the port 'metrics'"),
    "a monitor that renames the job": (
        lambda f: endpoint(f).pop("honorLabels"), "references", "`job` is overwritten"),
    "a monitor of other pods": (
        lambda f: put(one(f, "PodMonitor", "ray")["spec"]["selector"]["matchLabels"],
                      **{"app.kubernetes.io/component": "rays"}), "references", "selects no pod"),
    "a queue of another": (
        lambda f: put(one(f, "LocalQueue", "runs")["spec"], clusterQueue="pipelines"),
        "references", "no ClusterQueue 'pipelines'"),
    "a flavor that is not there": (
        lambda f: f.remove(one(f, "ResourceFlavor", "pipeline")),
        "references", "no ResourceFlavor"),
    "a priority that is not there": (
        lambda f: put(one(f, "ConfigMap", "platform")["data"], priority="high"),
        "references", "no WorkloadPriorityClass 'high'"),
}  # fmt: skip
MISTAKES = {("local", name): row for name, row in OF_PLATFORMS.items()}
MISTAKES |= {("elastic", name): row for name, row in OF_SCHEDULES.items()}
MISTAKES |= {("production", name): row for name, row in OF_PRODUCTION.items()}


@pytest.mark.parametrize(("overlay", "mistake"), MISTAKES)
def test_a_mistake_in_a_platform_is_caught(
    overlay: str, mistake: str, built: dict[str, Documents]
) -> None:
    plant, check, words = MISTAKES[overlay, mistake]
    found = copy.deepcopy(built[overlay])
    plant(found)
    faults = platform_checks(found)[check]()
    assert any(words in fault for fault in faults), faults


def test_every_check_of_a_platform_sees_some_mistake() -> None:
    assert {check for _, check, _ in MISTAKES.values()} == platform_checks([]).keys()
