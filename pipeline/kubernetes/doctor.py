"""What a cluster lacks to run jobs, each with how to mend it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.errors import UsageError
from pipeline.kubernetes.client import Document, Kubernetes
from pipeline.kubernetes.platform import Platform

OLDEST = (1, 29)
OPERATOR_NAMESPACE = "kuberay-operator"
"""That the network policies let in."""
FIELDS = ("authOptions", "preRunningDeadlineSeconds", "backoffLimit")
"""Of a RayJob, the newest that runs need."""
RIGHTS = (
    *((verb, "ray.io", "rayjobs", "") for verb in ("get", "list", "create", "patch", "delete")),
    ("get", "ray.io", "rayclusters", ""),
    *((verb, "", "configmaps", "") for verb in ("get", "create", "patch")),
    ("list", "", "pods", ""),
    ("get", "", "pods", "log"),
)
"""What `submit`, `status`, `logs` and `stop` ask for."""


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
    namespace, found = _looked(
        cluster,
        f"/api/v1/namespaces/{cluster.namespace}",
        f"namespace {cluster.namespace}",
        "kubectl apply -f k8s/base/namespace.yaml",
    )
    yield found
    labels = ((namespace or {}).get("metadata") or {}).get("labels") or {}
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
    listed, finding = _looked(cluster, "/api/v1/nodes", "the nodes", "")
    nodes = listed["items"] if listed else None
    yield from _volumes(cluster, platform, nodes)
    yield from _secrets(cluster, platform)
    yield from _tracking(cluster)
    if platform.gpu_image:
        yield from [finding] if nodes is None else _gpus(platform, nodes)
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
    crd, found = _looked(cluster, path, "KubeRay's RayJob", install)
    yield found
    if crd is not None:
        missing = [field for field in FIELDS if field not in _fields(crd)]
        yield Finding(
            f"its fields {', '.join(FIELDS)}",
            not missing,
            f"{', '.join(missing)}: the definitions are of an older KubeRay; helm does not upgrade "
            "them: kubectl replace those of 1.7.0",
        )
    path = f"/apis/apps/v1/namespaces/{OPERATOR_NAMESPACE}/deployments"
    listed, found = _looked(cluster, path, f"an operator in {OPERATOR_NAMESPACE}", install)
    items = (listed or {"items": []})["items"]
    runs = any((one.get("status") or {}).get("readyReplicas") for one in items)
    yield Finding(found.what, runs, found.fix, is_needed=found.is_needed)


def _fields(crd: Document) -> set[str]:
    """The fields of the spec of what a definition defines, and of its Ray cluster's."""
    fields: set[str] = set()
    for version in (crd.get("spec") or {}).get("versions") or []:
        schema = (version.get("schema") or {}).get("openAPIV3Schema") or {}
        of_job = schema.get("properties", {}).get("spec", {}).get("properties", {})
        of_cluster = of_job.get("rayClusterSpec", {}).get("properties", {})
        fields |= {*of_job, *of_cluster}
    return fields


def _rights(cluster: Kubernetes) -> Iterator[Finding]:
    for verb, group, resource, part in RIGHTS:
        what = f"{resource}/{part}" if part else resource
        named = f"{what}.{group}" if group else what
        yield Finding(
            f"you may {verb} {what}",
            cluster.may(verb, group, resource, part),
            f"a role with {verb} on {named} in {cluster.namespace}, bound to you",
        )


def _volumes(
    cluster: Kubernetes, platform: Platform, nodes: list[Document] | None
) -> Iterator[Finding]:
    num_nodes = 2 if nodes is None else len(nodes)  # several, unless we know better
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
            not mode or mode in modes or num_nodes == 1,
            f"its modes are {', '.join(modes)}: head and workers on several nodes need "
            f"ReadWriteMany, with file locks across nodes",
        )


def _secrets(cluster: Kubernetes, platform: Platform) -> Iterator[Finding]:
    names = ["mlflow-database", platform.mlflow_secret, platform.storage_secret]
    names += ["mlflow-auth"] if platform.mlflow_secret else []
    for name in filter(None, [*names, platform.image_pull_secret]):
        path = f"/api/v1/namespaces/{cluster.namespace}/secrets/{name}"
        yield _looked(cluster, path, f"the Secret {name}", "k8s/README.md names its keys")[1]


def _tracking(cluster: Kubernetes) -> Iterator[Finding]:
    path = f"/apis/apps/v1/namespaces/{cluster.namespace}/deployments/mlflow"
    fix = f"kubectl -n {cluster.namespace} logs deployment/mlflow --all-containers"
    found, finding = _looked(cluster, path, "MLflow runs", fix)
    runs = bool(((found or {}).get("status") or {}).get("readyReplicas"))
    yield Finding(finding.what, runs, finding.fix, is_needed=False)


def _gpus(platform: Platform, nodes: list[Document]) -> Iterator[Finding]:
    having = [
        node
        for node in nodes
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
    if platform.queue:
        path = f"/apis/kueue.x-k8s.io/v1beta1/namespaces/{cluster.namespace}/localqueues"
        fix = "install Kueue with the integration ray.io/rayjob, and apply the component kueue"
        path += f"/{platform.queue}"
        yield _looked(cluster, path, f"Kueue's queue {platform.queue}", fix)[1]


def _looked(cluster: Kubernetes, path: str, what: str, fix: str) -> tuple[Any, Finding]:
    """An object, and that it is there; one that we may not look at is a note, and None."""
    try:
        found = cluster.get(path)
    except UsageError as error:
        return None, Finding(what, False, f"it is not seen: {error}", is_needed=False)
    return found, Finding(what, found is not None, fix)
