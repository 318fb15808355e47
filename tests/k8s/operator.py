"""What KubeRay 1.7.0 makes of a RayJob, as its source says (`common/pod.go`, `common/job.go`)."""

from __future__ import annotations

import copy
import shlex

from pipeline.kubernetes.rules import Document

HEAD_FQDN = "cluster-head-svc.pipeline.svc.cluster.local"
TOKEN = [
    {"name": "RAY_AUTH_MODE", "value": "token"},
    {
        "name": "RAY_AUTH_TOKEN",
        "valueFrom": {"secretKeyRef": {"name": "cluster", "key": "auth_token"}},
    },
]
"""Variables of each container that speaks to Ray."""
FLAGS = ("log-color", "include-dashboard", "include-log-monitor")


def expand(job: Document) -> list[Document]:
    """A Pod of the head, one of each worker group, and one of the submitter."""
    spec = job["spec"]
    cluster = spec["rayClusterSpec"]
    made = [_head(job, cluster)]
    made += [_worker(job, group) for group in cluster["workerGroupSpecs"]]
    made.append(_submitter(job, spec))
    return made


def start_command(params: dict[str, str], resources: Document, is_head: bool) -> list[str]:
    """The words of `ray start`, from its parameters and the container's resources."""
    params = dict(params)
    limits = resources.get("limits", {})
    params.setdefault("memory", str(_bytes(limits["memory"])))
    gpus = [count for key, count in sorted(limits.items()) if key.endswith("gpu")]
    if gpus:
        params.setdefault("num-gpus", str(gpus[0]))
    if is_head:
        params.setdefault("dashboard-host", "0.0.0.0")
    else:
        params.setdefault("address", f"{HEAD_FQDN}:6379")
    params |= {"block": "true", "dashboard-agent-listen-port": "52365"}
    params.setdefault("metrics-export-port", "8080")
    text = "ray start " + ("--head " if is_head else "")
    for key, value in sorted(params.items()):
        is_switch = value.lower() in ("true", "false") and key not in FLAGS
        text += (f" --{key} " if value == "true" else "") if is_switch else f" --{key}={value} "
    return shlex.split(text)  # a shell reads it


def _bytes(quantity: str) -> int:
    from pipeline.kubernetes.platform import amount

    return int(amount(quantity))


def _pod(job: Document, template: Document, name: str, labels: dict[str, str]) -> Document:
    template = copy.deepcopy(template)
    metadata = template.setdefault("metadata", {})
    metadata |= {"name": name, "namespace": job["metadata"].get("namespace", "default")}
    metadata["labels"] = metadata.get("labels", {}) | labels
    return {"apiVersion": "v1", "kind": "Pod", **template}


def _ray_labels(job: Document, kind: str, group: str) -> dict[str, str]:
    return {
        "ray.io/node-type": kind,
        "ray.io/cluster": f"{job['metadata']['name']}-abcde",
        "ray.io/group": group,
        "ray.io/is-ray-node": "yes",
        "app.kubernetes.io/created-by": "kuberay-operator",
    }


def _ray_container(pod: Document, group: Document, is_head: bool) -> Document:
    (container, *_) = pod["spec"]["containers"]
    resources = container.get("resources", {})
    words = start_command(group.get("rayStartParams", {}), resources, is_head)
    container["command"] = ["/bin/bash", "-c", "--"]
    container["args"] = ["ulimit -n ${RAY_START_ULIMIT_OPEN_FILES:-65536}; " + shlex.join(words)]
    ports = container.setdefault("ports", [])
    if not any(port.get("name") == "metrics" for port in ports):
        ports.append({"name": "metrics", "containerPort": 8080})
    container["env"] += TOKEN
    at = "127.0.0.1" if is_head else HEAD_FQDN
    added = {
        "RAY_CLUSTER_NAME": pod["metadata"]["labels"]["ray.io/cluster"],
        "RAY_CLUSTER_NAMESPACE": pod["metadata"]["namespace"],
        "RAY_CLOUD_INSTANCE_ID": pod["metadata"]["name"],
        "RAY_NODE_TYPE_NAME": pod["metadata"]["labels"]["ray.io/group"],
        "KUBERAY_GEN_RAY_START_CMD": shlex.join(words),
        "RAY_PORT": "6379",
        "RAY_ADDRESS": f"{at}:6379",
        "RAY_USAGE_STATS_KUBERAY_IN_USE": "1",
        "RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE": "1",
    }
    if not is_head:
        added |= {"FQ_RAY_IP": HEAD_FQDN, "RAY_IP": HEAD_FQDN.partition(".")[0]}
    container["env"] += [{"name": name, "value": value} for name, value in added.items()]
    probe = {"httpGet": {"path": "/api/healthz", "port": 52365}, "timeoutSeconds": 5}
    container.setdefault("livenessProbe", dict(probe))
    container.setdefault("readinessProbe", dict(probe))
    return dict(container)


def _head(job: Document, cluster: Document) -> Document:
    group = cluster["headGroupSpec"]
    labels = group.get("labels", {}) | _ray_labels(job, "head", "headgroup")
    pod = _pod(job, group["template"], "head", labels)
    container = _ray_container(pod, group, is_head=True)
    if cluster.get("enableInTreeAutoscaling"):
        options = cluster.get("autoscalerOptions", {})
        resources = {"cpu": "500m", "memory": "512Mi"}
        sidecar = {
            "name": "autoscaler",
            "image": container["image"],
            "imagePullPolicy": options.get("imagePullPolicy", "IfNotPresent"),
            "command": ["/bin/bash", "-c", "--"],
            "args": ["ray kuberay-autoscaler --cluster-name x --cluster-namespace pipeline"],
            "resources": options.get("resources", {"limits": resources, "requests": resources}),
            "volumeMounts": [
                *options.get("volumeMounts", []),
                {"name": "ray-logs", "mountPath": "/tmp/ray"},
            ],
        }
        if "securityContext" in options:
            sidecar["securityContext"] = options["securityContext"]
        pod["spec"]["containers"].append(sidecar)
        pod["spec"]["containers"][0]["volumeMounts"].append(
            {"name": "ray-logs", "mountPath": "/tmp/ray"}
        )
        pod["spec"]["volumes"].append({"name": "ray-logs", "emptyDir": {}})
        pod["spec"]["restartPolicy"] = "Never"
    return pod


def _worker(job: Document, group: Document) -> Document:
    labels = group.get("labels", {}) | _ray_labels(job, "worker", group["groupName"])
    pod = _pod(job, group["template"], f"worker-{group['groupName']}", labels)
    before = copy.deepcopy(pod["spec"]["containers"][0])
    small = {"cpu": "200m", "memory": "256Mi"}
    waits = {
        "name": "wait-gcs-ready",
        "image": before["image"],
        "imagePullPolicy": before.get("imagePullPolicy", "IfNotPresent"),
        "command": ["/bin/bash", "-c", "--"],
        "args": [f"until ray health-check --address {HEAD_FQDN}:6379; do sleep 5; done"],
        "env": [*before.get("env", []), *TOKEN],
        "volumeMounts": before.get("volumeMounts", []),
        "resources": {"limits": small, "requests": dict(small)},
    }
    if "securityContext" in before:
        waits["securityContext"] = before["securityContext"]
    pod["spec"].setdefault("initContainers", []).append(waits)
    _ray_container(pod, group, is_head=False)
    return pod


def _submitter(job: Document, spec: Document) -> Document:
    default = {
        "spec": {
            "restartPolicy": "Never",
            "containers": [
                {
                    "name": "ray-job-submitter",
                    "image": "ray",
                    "resources": {
                        "limits": {"cpu": "1", "memory": "1Gi"},
                        "requests": {"cpu": "500m", "memory": "200Mi"},
                    },
                }
            ],
        }
    }
    labels = {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    pod = _pod(job, spec.get("submitterPodTemplate", default), "submitter", labels)
    (container, *_) = pod["spec"]["containers"]
    if not container.get("command"):
        container["command"] = ["/bin/bash", "-ce"]
        container["args"] = [submit_script(spec)]
    container["env"] = [*container.get("env", []), *TOKEN]
    return pod


def submit_script(spec: Document, job_id: str = "run-abcde") -> str:
    """What the submitter's shell reads; the entrypoint stands in it as it is."""
    at = "--address http://head:8265"
    return (
        f"if ! ray job status {at} {job_id} >/dev/null 2>&1 ; then ray job submit {at} --no-wait "
        f"--submission-id {job_id} -- {spec['entrypoint'].strip()} ; fi ; "
        f"ray job logs {at} --follow {job_id}"
    )
