"""The manifests of a run: a ConfigMap with its files, and the RayJob that trains it."""

from __future__ import annotations

from typing import Any

from pipeline.kubernetes import pods, workers
from pipeline.kubernetes.files import contents
from pipeline.kubernetes.run import Run
from pipeline.kubernetes.workers import WorkerPods

Document = dict[str, Any]

RAY_VERSION = "2.60.0"
"""That of the images."""
OBJECT_STORE_BYTES = 256 * 2**20
"""Of Ray's shared memory: rows do not pass through it."""


def manifests(run: Run) -> list[Document]:
    """The documents that train a run, to be applied together."""
    return [_config_map(run), _ray_job(run)]


def _metadata(run: Run) -> Document:
    labels = {**pods.LABELS, "app.kubernetes.io/name": run.name}
    queue = run.platform.queue
    if queue:
        labels["kueue.x-k8s.io/queue-name"] = queue
    if queue and run.platform.priority:
        labels["kueue.x-k8s.io/priority-class"] = run.platform.priority
    notes = {"pipeline/job": run.spec.name, "pipeline/identity": run.identity}
    return {
        "name": run.name,
        "namespace": run.platform.namespace,
        "labels": labels,
        "annotations": notes,
    }


def _config_map(run: Run) -> Document:
    held = contents(run.package, run.source or {})
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _metadata(run), **held}


def _ray_job(run: Run) -> Document:
    limits = run.limits
    group = workers.worker_pods(run.spec.workers, run.platform)
    cluster: Document = {
        # quoted: the operator chooses its features by it
        "rayVersion": RAY_VERSION,
        # without `mode` there is no authentication, and whoever reaches port 8265 may run code
        "authOptions": {"mode": "token"},
        "headGroupSpec": {
            "rayStartParams": {
                "num-cpus": "0",  # the command runs there, training does not
                "object-store-memory": str(OBJECT_STORE_BYTES),
            },
            "template": pods.head_pod(run, group),
        },
        "workerGroupSpecs": [_worker_group(run, group)],
    }
    if group.is_elastic:
        cluster |= {
            "enableInTreeAutoscaling": True,
            "autoscalerOptions": {
                "version": "v2",
                "imagePullPolicy": run.platform.image_pull_policy,
                "idleTimeoutSeconds": 60,
                "securityContext": pods.container_security(),
                "resources": pods.resources_of("500m", "512Mi"),
                "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
            },
        }
    spec: Document = {
        "entrypoint": run.command.replace("$", "$$"),  # the kubelet reads $(NAME) and $$
        "submissionMode": "K8sJobMode",
        "submitterConfig": {"backoffLimit": 2},
        "submitterPodTemplate": pods.submitter_pod(run),
        "backoffLimit": limits.retries,
        "preRunningDeadlineSeconds": limits.waiting_seconds,
        "activeDeadlineSeconds": limits.active_seconds,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": limits.ttl_seconds,
        "rayClusterSpec": cluster,
    }
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": _metadata(run), "spec": spec}


def _worker_group(run: Run, group: WorkerPods) -> Document:
    params = {**workers.start_params(group), "object-store-memory": str(OBJECT_STORE_BYTES)}
    document: Document = {
        "groupName": "workers",
        "replicas": group.least,
        "minReplicas": group.least,
        "maxReplicas": group.most,
        "rayStartParams": params,
        "template": pods.worker_pod(run, group),
    }
    if group.labels:
        document["labels"] = group.labels
    return document
