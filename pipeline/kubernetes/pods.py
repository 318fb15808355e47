"""The pods of a run: Ray's head, its workers, and the one that submits the command."""

from __future__ import annotations

from typing import Any

from pipeline.cluster.package import SOURCE
from pipeline.kubernetes import workers
from pipeline.kubernetes.files import keys_of
from pipeline.kubernetes.platform import Platform
from pipeline.kubernetes.run import DATA_MOUNT, RUNS_MOUNT, Run
from pipeline.kubernetes.workers import WorkerPods

Document = dict[str, Any]

LABELS = {"app.kubernetes.io/part-of": "pipeline"}
COMPONENT = "app.kubernetes.io/component"
USER = 1000
"""The images' own."""
JOB_MOUNT = "/job"
CACHE_MOUNT = "/cache"
RAY_SECONDS = 30
"""Of the grace, left to Ray after the command has saved its state."""
LOST_NODE_SECONDS = 30
"""A pod on a node that is lost is deleted after so long; 300 s by default, in which the operator
gives the whole attempt up."""


def head_pod(run: Run, group: WorkerPods) -> Document:
    """Of the command, which does not train."""
    platform = run.platform
    spot = [
        {"key": key, "operator": "NotIn", "values": [value]}
        for key, value in sorted(platform.spot_label.items())
    ]
    resources = resources_of(platform.head_cpu, platform.head_memory)
    container = _ray_container(run, resources)
    # before its processes are ended, or its cluster deleted: the command saves its state
    stop = ["python", "-m", "pipeline.kubernetes.pre_stop", str(_saving_seconds(platform))]
    container["lifecycle"] = {"preStop": {"exec": {"command": stop}}}
    spec = _ray_pod_spec(run, container)
    if affinity := workers.required(spot):  # its loss ends the attempt
        spec["affinity"] = affinity
    if group.is_elastic:  # the autoscaler asks for pods
        spec |= {"serviceAccountName": "ray-autoscaler", "automountServiceAccountToken": True}
    return {"metadata": _pod_metadata("ray", stays=True), "spec": spec}


def worker_pod(run: Run, group: WorkerPods) -> Document:
    """Of one or several workers."""
    resources = resources_of(group.cpu_request, group.memory)
    if group.gpus:
        gpus = {run.platform.gpu_resource: str(group.gpus)}
        resources["requests"] |= gpus
        resources["limits"] |= gpus
    spec = _ray_pod_spec(run, _ray_container(run, resources))
    spec["tolerations"] += group.tolerations
    affinity = workers.node_affinity(group)
    own = {"app.kubernetes.io/name": run.name, COMPONENT: "ray"}
    term: Document = {
        "labelSelector": {"matchLabels": own},
        "topologyKey": "kubernetes.io/hostname",
    }
    if group.is_apart:
        affinity["podAntiAffinity"] = {"requiredDuringSchedulingIgnoredDuringExecution": [term]}
    if group.is_spread:
        even = {"maxSkew": 1, "whenUnsatisfiable": "ScheduleAnyway"}
        spec["topologySpreadConstraints"] = [term | even]
    if affinity:
        spec["affinity"] = affinity
    metadata = _pod_metadata("ray", stays=not group.is_elastic)
    metadata["labels"]["app.kubernetes.io/name"] = run.name
    return {"metadata": metadata, "spec": spec}


def submitter_pod(run: Run) -> Document:
    """Of `ray job submit`, given in full: the operator's own has no security context."""
    container = {
        "name": "submitter",  # without a command: the operator fills it in
        "image": run.platform.image,
        "imagePullPolicy": run.platform.image_pull_policy,
        "env": [{"name": "RAY_USAGE_STATS_ENABLED", "value": "0"}],
        "securityContext": container_security(),
        "resources": resources_of("200m", "512Mi"),
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    spec = {
        "restartPolicy": "Never",
        **_pod_spec(run.platform, container),
        "volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}}],
    }
    return {"metadata": _pod_metadata("submitter"), "spec": spec}


def _pod_metadata(component: str, stays: bool = False) -> Document:
    metadata: Document = {"labels": {**LABELS, COMPONENT: component}}
    if stays:  # autoscalers of nodes are not to move it
        metadata["annotations"] = {
            "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
            "karpenter.sh/do-not-disrupt": "true",
        }
    return metadata


def _pod_spec(platform: Platform, container: Document) -> Document:
    spec: Document = {
        "serviceAccountName": "ray",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,  # so that the user may write to mounted volumes
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
    }
    if platform.image_pull_secret:
        spec["imagePullSecrets"] = [{"name": platform.image_pull_secret}]
    return spec


def _ray_pod_spec(run: Run, container: Document) -> Document:
    platform = run.platform
    items = [{"key": key, "path": place} for key, place in keys_of(run.package).items()]
    items.append({"key": SOURCE, "path": SOURCE})
    volumes: list[Document] = [
        {"name": "job", "configMap": {"name": run.name, "items": items}},
        {"name": "tmp", "emptyDir": {"sizeLimit": "5Gi"}},
        {"name": "cache", "emptyDir": {"sizeLimit": platform.cache_size}},
        # counts towards the memory limit
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}},
    ]
    if platform.runs_claim:
        volumes.append(_claim("runs", platform.runs_claim))
    if platform.data_claim:
        volumes.append(_claim("data", platform.data_claim, read_only=True))
    lost = [
        {
            "key": f"node.kubernetes.io/{what}",
            "operator": "Exists",
            "effect": "NoExecute",
            "tolerationSeconds": LOST_NODE_SECONDS,
        }
        for what in ("not-ready", "unreachable")
    ]
    return {
        **_pod_spec(platform, container),
        "terminationGracePeriodSeconds": platform.grace_seconds,
        "tolerations": lost,
        "volumes": volumes,
    }


def _claim(name: str, claim: str, read_only: bool = False) -> Document:
    source: Document = {"claimName": claim}
    if read_only:
        source["readOnly"] = True
    return {"name": name, "persistentVolumeClaim": source}


def _ray_container(run: Run, resources: Document) -> Document:
    platform = run.platform
    mounts: list[Document] = [
        {"name": "job", "mountPath": JOB_MOUNT, "readOnly": True},
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "cache", "mountPath": CACHE_MOUNT},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    if platform.runs_claim:
        mounts.append({"name": "runs", "mountPath": RUNS_MOUNT})
    if platform.data_claim:
        mounts.append({"name": "data", "mountPath": DATA_MOUNT, "readOnly": True})
    container: Document = {
        "name": "ray",
        "image": run.image,
        "imagePullPolicy": platform.image_pull_policy,
        "workingDir": JOB_MOUNT,  # and so the command's
        "env": _environment(platform),
        "securityContext": container_security(),
        "resources": resources,
        "ports": [
            {"name": "metrics", "containerPort": 8080},
        ],
        "volumeMounts": mounts,
    }
    secrets = filter(None, [platform.mlflow_secret, platform.storage_secret])
    if sources := [{"secretRef": {"name": name}} for name in secrets]:
        container["envFrom"] = sources
    return container


def _environment(platform: Platform) -> list[dict[str, str]]:
    seconds = str(_saving_seconds(platform))
    values = {
        "MLFLOW_TRACKING_URI": platform.mlflow_uri,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PIPELINE_CACHE": CACHE_MOUNT,
        "PIPELINE_PROGRESS_SECONDS": "2",
        "PIPELINE_SOURCE": f"{JOB_MOUNT}/{SOURCE}",
        "RAY_USAGE_STATS_ENABLED": "0",
        # a stopped run saves its state: Ray's own 3 s would cut a large checkpoint off
        "RAY_JOB_STOP_WAIT_TIME_S": seconds,
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": seconds,
    }
    return [{"name": name, "value": value} for name, value in values.items()]


def _saving_seconds(platform: Platform) -> int:
    """For a checkpoint, within the pods' grace."""
    return platform.grace_seconds - RAY_SECONDS


def container_security() -> Document:
    """Of every container: Pod Security `restricted`, and a root that nothing is written to."""
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def resources_of(cpu: str, memory: str) -> Document:
    """No limit of CPUs: throttling one worker makes all of them wait. Memory is not oversold."""
    return {"requests": {"cpu": cpu, "memory": memory}, "limits": {"memory": memory}}
