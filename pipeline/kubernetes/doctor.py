"""What a cluster lacks to run jobs, each with how to mend it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.errors import UsageError
from pipeline.kubernetes.client import Kubernetes
from pipeline.kubernetes.platform import Platform

OLDEST = (1, 29)
OPERATOR_NAMESPACE = "kuberay-operator"
"""That the network policies let in."""
FIELDS = ("authOptions", "preRunningDeadlineSeconds", "backoffLimit")
"""Of a RayJob, the newest that runs need."""
RIGHTS = (
    ("create", "ray.io", "rayjobs", ""),
    ("delete", "ray.io", "rayjobs", ""),
    ("patch", "", "configmaps", ""),
    ("list", "", "pods", ""),
    ("get", "", "pods", "log"),
)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    is_well: bool
    fix: str = ""
    is_needed: bool = True
    """Whether no run trains without it."""


def findings(cluster: Kubernetes) -> Iterator[Finding]:
    """All that was looked at, the first cause first. Raises UsageError for no cluster."""
    yield _version(cluster)
    yield from _operator(cluster)
    yield from _rights(cluster)
    namespace = cluster.get(f"/api/v1/namespaces/{cluster.namespace}")
    yield Finding(
        f"namespace {cluster.namespace}",
        namespace is not None,
        "kubectl apply -f k8s/base/namespace.yaml",
    )
    if namespace is None:
        return
    labels = namespace["metadata"].get("labels") or {}
    yield Finding(
        "Pod Security `restricted` in it",
        labels.get("pod-security.kubernetes.io/enforce") == "restricted",
        "kubectl apply -f k8s/base/namespace.yaml",
        is_needed=False,
    )
    try:
        platform = cluster.platform()
    except UsageError as error:
        yield Finding("settings of the platform", False, str(error))
        return
    yield Finding("settings of the platform", True)
    yield from _volumes(cluster, platform)
    yield from _secrets(cluster, platform)
    yield from _tracking(cluster)
    yield from _gpus(cluster, platform)
    yield from _queue(cluster, platform)


def _version(cluster: Kubernetes) -> Finding:
    found = cluster.get("/version") or {}
    digits = ["".join(c for c in str(found.get(key, "0")) if c.isdigit()) or "0"
              for key in ("major", "minor")]  # fmt: skip
    version = (int(digits[0]), int(digits[1]))
    text = f"Kubernetes {version[0]}.{version[1]} at {cluster.address}"
    return Finding(text, version >= OLDEST, f"{OLDEST[0]}.{OLDEST[1]} or newer is needed")


def _operator(cluster: Kubernetes) -> Iterator[Finding]:
    path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/rayjobs.ray.io"
    install = "helm install kuberay-operator kuberay/kuberay-operator --version 1.7.0 --namespace "
    install += f"{OPERATOR_NAMESPACE} --create-namespace"
    try:
        crd = cluster.get(path)
    except UsageError as error:  # it may not be ours to look at
        yield Finding("KubeRay's RayJob", False, str(error), is_needed=False)
        return
    yield Finding("KubeRay's RayJob", crd is not None, install)
    if crd is None:
        return
    text = str(crd)
    missing = [field for field in FIELDS if field not in text]
    yield Finding(
        f"its fields {', '.join(FIELDS)}",
        not missing,
        f"{', '.join(missing)}: the definitions are of an older KubeRay; helm does not upgrade "
        "them: kubectl replace those of 1.7.0",
    )
    deployments = f"/apis/apps/v1/namespaces/{OPERATOR_NAMESPACE}/deployments"
    try:
        found = (cluster.get(deployments) or {}).get("items", [])
    except UsageError:
        return
    ready = [one for one in found if (one.get("status") or {}).get("readyReplicas")]
    yield Finding(f"an operator that runs in {OPERATOR_NAMESPACE}", bool(ready), install)


def _rights(cluster: Kubernetes) -> Iterator[Finding]:
    for verb, group, resource, part in RIGHTS:
        what = f"{resource}/{part}" if part else resource
        named = f"{what}.{group}" if group else what
        yield Finding(
            f"you may {verb} {what}",
            cluster.may(verb, group, resource, part),
            f"a role with {verb} on {named} in {cluster.namespace}, bound to you",
        )


def _volumes(cluster: Kubernetes, platform: Platform) -> Iterator[Finding]:
    nodes = len((_seen(cluster, "/api/v1/nodes") or {"items": [{}, {}]})["items"])
    for claim, mode in ((platform.runs_claim, "ReadWriteMany"), (platform.data_claim, "")):
        if not claim:
            continue
        path = f"/api/v1/namespaces/{cluster.namespace}/persistentvolumeclaims/{claim}"
        found = cluster.get(path)
        yield Finding(f"the volume claim {claim}", found is not None, "apply the overlay")
        if found is None:
            continue
        phase = (found.get("status") or {}).get("phase")
        modes = found["spec"].get("accessModes") or []
        kind = found["spec"].get("storageClassName") or "the default class"
        yield Finding(
            f"{claim} is bound",
            phase == "Bound",
            f"it is {phase}: does {kind} exist, and give {mode or 'it'}? A class that waits for "
            "the first pod binds it then",
            is_needed=False,
        )
        yield Finding(
            f"{claim} is seen by all nodes",
            not mode or mode in modes or nodes == 1,
            f"its modes are {', '.join(modes)}: head and workers on several nodes need "
            f"ReadWriteMany, with file locks across nodes",
        )


def _secrets(cluster: Kubernetes, platform: Platform) -> Iterator[Finding]:
    names = ["mlflow-database", platform.mlflow_secret, platform.storage_secret]
    for name in filter(None, [*names, platform.image_pull_secret]):
        path = f"/api/v1/namespaces/{cluster.namespace}/secrets/{name}"
        try:
            found = cluster.get(path)
        except UsageError:
            yield Finding(f"the Secret {name}", False, "you may not look at it", is_needed=False)
            continue
        yield Finding(f"the Secret {name}", found is not None, "k8s/README.md names its keys")


def _tracking(cluster: Kubernetes) -> Iterator[Finding]:
    path = f"/apis/apps/v1/namespaces/{cluster.namespace}/deployments/mlflow"
    found = _seen(cluster, path)
    ready = found is not None and bool((found.get("status") or {}).get("readyReplicas"))
    fix = f"kubectl -n {cluster.namespace} logs deployment/mlflow --all-containers"
    yield Finding("MLflow answers", ready, fix, is_needed=False)


def _gpus(cluster: Kubernetes, platform: Platform) -> Iterator[Finding]:
    if not platform.gpu_image:
        return
    listed = _seen(cluster, "/api/v1/nodes")
    if listed is None:
        yield Finding("nodes with GPUs", False, "you may not list nodes", is_needed=False)
        return
    having = [
        node
        for node in listed["items"]
        if int((node.get("status") or {}).get("allocatable", {}).get(platform.gpu_resource, 0))
    ]
    yield Finding(
        f"{len(having)} nodes with {platform.gpu_resource}",
        bool(having),
        "none now: without a device plugin nodes have none; a pool that grows from 0 may still",
        is_needed=False,
    )
    labels = {(n["metadata"].get("labels") or {}).get(platform.gpu_type_label) for n in having}
    for name, value in platform.gpu_types.items():
        yield Finding(
            f"nodes with GPUs of the type {name}",
            value in labels,
            f"no node is labelled {platform.gpu_type_label}={value}",
            is_needed=False,
        )


def _queue(cluster: Kubernetes, platform: Platform) -> Iterator[Finding]:
    if not platform.queue:
        return
    path = f"/apis/kueue.x-k8s.io/v1beta1/namespaces/{cluster.namespace}/localqueues"
    found = _seen(cluster, f"{path}/{platform.queue}")
    yield Finding(
        f"Kueue's queue {platform.queue}",
        found is not None,
        "install Kueue with the integration ray.io/rayjob, and apply the component kueue",
    )


def _seen(cluster: Kubernetes, path: str) -> Any:
    """An object, or None also where we may not look at it."""
    try:
        return cluster.get(path)
    except UsageError:
        return None
