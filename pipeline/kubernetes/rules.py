"""What a RayJob must keep so that it runs: rules of the operator, of Pod Security, and ours.

The API server accepts a RayJob that breaks the operator's rules; the operator then says
`ValidationFailed`, or nothing.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from typing import Any

Document = dict[str, Any]

MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode")
"""Of submission; SidecarMode's container has no security context."""
LABEL = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
LABEL_KEY = re.compile(
    r"([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
)
VOLUMES = {
    *("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral"),
    *("persistentVolumeClaim", "projected", "secret"),
}
"""Kinds that Pod Security `restricted` allows."""


def faults(documents: list[Document]) -> list[str]:
    """All that is wrong in a run's documents; empty if they are well."""
    found = [*(fault for one in documents for fault in ray_job_faults(one))]
    return found + pod_security_faults(documents)


def ray_job_faults(document: Document) -> list[str]:
    """What the operator would refuse of a RayJob, and what we ask of each; nothing of others."""
    if document.get("kind") != "RayJob":
        return []
    name = document.get("metadata", {}).get("name", "")
    spec = document.get("spec", {})
    cluster = spec.get("rayClusterSpec") or {}
    parts = [_name_faults(name), _job_faults(spec), _deletion_faults(spec), _our_faults(spec)]
    parts += [_cluster_faults(cluster), _grace_faults(cluster), _autoscaler_faults(cluster)]
    return [f"RayJob/{name}: {fault}" for part in parts for fault in part]


def _broken(rules: dict[str, bool]) -> list[str]:
    """The rules whose condition is met."""
    return [rule for rule, is_broken in rules.items() if is_broken]


def _name_faults(name: str) -> list[str]:
    fits = re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", name)
    return _broken({"a name is 1 to 47 characters of [a-z0-9-], a letter first": not fits})


def _job_faults(spec: Document) -> list[str]:
    mode, selector = spec.get("submissionMode"), spec.get("clusterSelector")
    entrypoint = str(spec.get("entrypoint") or "")
    retries = spec.get("backoffLimit", 0)
    return _broken(
        {
            # the schema lists no modes
            f"submissionMode is one of {', '.join(MODES)}": mode not in MODES,
            "entrypoint is one command, quoted for the shells that read it": not _is_quoted(
                entrypoint
            ),
            "runtimeEnvYAML holds no $ and no backtick: a shell reads it": bool(
                re.search(r"[$`]", str(spec.get("runtimeEnvYAML", "")))
            ),
            "suspend needs shutdownAfterJobFinishes": bool(
                spec.get("suspend") and not spec.get("shutdownAfterJobFinishes")
            ),
            "suspend and clusterSelector exclude each other": bool(
                spec.get("suspend") and selector
            ),
            "one of rayClusterSpec and clusterSelector is given": not (
                spec.get("rayClusterSpec") or selector
            ),
            "backoffLimit is not negative": retries < 0,
            "backoffLimit and clusterSelector exclude each other": bool(retries and selector),
            "backoffLimit and InteractiveMode exclude each other": bool(
                retries and mode == "InteractiveMode"
            ),
            "deadlines are positive": any(
                spec.get(key, 1) <= 0
                for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds")
            ),
        }
    )


def _is_quoted(command: str) -> bool:
    """Whether no shell changes a word of a command, or finds another command in it."""
    try:
        words = shlex.split(command)
    except ValueError:
        return False
    return bool(words) and shlex.join(words) == command


def _deletion_faults(spec: Document) -> list[str]:
    ends, ttl = spec.get("shutdownAfterJobFinishes"), spec.get("ttlSecondsAfterFinished", 0)
    strategy = spec.get("deletionStrategy") or {}
    return _broken(
        {
            "ttlSecondsAfterFinished is not negative": ttl < 0,
            "ttlSecondsAfterFinished needs shutdownAfterJobFinishes": bool(ttl and not ends),
            "deletionRules and shutdownAfterJobFinishes exclude each other": bool(
                strategy.get("deletionRules") and ends
            ),
            "a queue needs shutdownAfterJobFinishes, and no deletionStrategy": bool(
                strategy and spec.get("suspend")
            ),
        }
    )


def _our_faults(spec: Document) -> list[str]:
    cluster = spec.get("rayClusterSpec") or {}
    head = cluster.get("headGroupSpec", {})
    active, waiting = (
        spec.get(key, 0) for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds")
    )
    return _broken(
        {
            "submitterPodTemplate is given: the operator's own fails Pod Security": (
                spec.get("submissionMode") == "K8sJobMode" and "submitterPodTemplate" not in spec
            ),
            "activeDeadlineSeconds and preRunningDeadlineSeconds are given": not (
                active and waiting
            ),
            "preRunningDeadlineSeconds is shorter than activeDeadlineSeconds": bool(
                active and waiting and waiting >= active
            ),
            "shutdownAfterJobFinishes is on: a Ray cluster costs as long as it stands": not (
                spec.get("shutdownAfterJobFinishes")
            ),
            "authOptions.mode is token: left out, it means no authentication": (
                cluster.get("authOptions", {}).get("mode") != "token"
            ),
            'the head\'s num-cpus is "0": training stays off it': (
                head.get("rayStartParams", {}).get("num-cpus") != "0"
            ),
            "the command runs on the head: no entrypointNumCpus, no entrypointNumGpus": any(
                spec.get(key) for key in ("entrypointNumCpus", "entrypointNumGpus")
            ),
        }
    )  # fmt: skip


def _cluster_faults(cluster: Document) -> list[str]:
    found = []
    version = str(cluster.get("rayVersion", ""))
    parts = [int(part) for part in version.split(".") if part.isdigit()]
    if parts < [2, 52]:
        found.append(f"rayVersion {version!r}: tokens need 2.52.0 or newer")
    for name, group in _groups(cluster):
        params = group.get("rayStartParams", {})
        least, most = group.get("minReplicas", 0), group.get("maxReplicas", 2**31 - 1)
        labels = group.get("labels") or {}
        resources = ("num-cpus", "num-gpus", "memory", "resources")
        wrong = {
            "resources stand in rayStartParams or in `resources`, not in both": bool(
                group.get("resources") and any(params.get(key) for key in resources)
            ),
            "labels stand in `labels`, not in rayStartParams": "labels" in params,
            "labels have the syntax of Kubernetes labels": not all(
                LABEL_KEY.fullmatch(key) and LABEL.fullmatch(str(value))
                for key, value in labels.items()
            ),
            "0 <= minReplicas <= replicas <= maxReplicas": name != "head" and not (
                0 <= least <= group.get("replicas", least) <= most
            ),
            "suspend of a group is not for runs": bool(group.get("suspend")),
            "the Ray container comes first, and is called `ray`": (
                (group.get("template", {}).get("spec", {}).get("containers") or [{}])[0].get("name")
                != "ray"
            ),
        }  # fmt: skip
        found += [f"group {name}: {fault}" for fault in _broken(wrong)]
    return found


def _groups(cluster: Document) -> Iterator[tuple[str, Document]]:
    if head := cluster.get("headGroupSpec"):
        yield "head", head
    for group in cluster.get("workerGroupSpecs") or []:
        yield str(group.get("groupName")), group


def _grace_faults(cluster: Document) -> list[str]:
    """A stopped run has the time to save its state, and a lost head is replaced in time."""
    found = []
    for name, group in _groups(cluster):
        pod = group.get("template", {}).get("spec", {})
        grace = pod.get("terminationGracePeriodSeconds", 30)
        for container in pod.get("containers") or []:
            said = {one.get("name"): one.get("value", "") for one in container.get("env") or []}
            waits = [
                int(said.get(key) or 0)
                for key in ("RAY_JOB_STOP_WAIT_TIME_S", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S")
            ]
            if container.get("name") == "ray" and not (30 <= min(waits) <= max(waits) < grace):
                found.append(
                    f"group {name}: RAY_JOB_STOP_WAIT_TIME_S and RAY_GRACEFUL_SHUTDOWN_DRAIN_"
                    f"TIMEOUT_S are 30 or more, and less than the pod's grace of {grace} s"
                )
        tolerated = {
            one.get("key"): one.get("tolerationSeconds") for one in pod.get("tolerations") or []
        }
        for what in ("not-ready", "unreachable"):
            seconds = tolerated.get(f"node.kubernetes.io/{what}")
            if seconds is None or seconds > 60:
                found.append(f"group {name}: a node that is {what} is tolerated for 60 s at most")
    head = cluster.get("headGroupSpec", {}).get("template", {}).get("spec", {})
    hooks = [
        one.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command")
        for one in (head.get("containers") or [])[:1]
    ]
    if not any(hooks):
        found.append("group head: preStop lets the command save its state")
    return found


def _autoscaler_faults(cluster: Document) -> list[str]:
    options = cluster.get("autoscalerOptions") or {}
    is_on = bool(cluster.get("enableInTreeAutoscaling"))
    ranges = [
        group.get("minReplicas") != group.get("maxReplicas")
        for group in cluster.get("workerGroupSpecs") or []
    ]
    pods = [group.get("template", {}).get("spec", {}) for _, group in _groups(cluster)]
    environment = {
        each.get("name"): str(each.get("value", "")).lower()
        for pod in pods
        for container in pod.get("containers") or []
        for each in container.get("env") or []
    }
    head = cluster.get("headGroupSpec", {}).get("template", {}).get("spec", {})
    return _broken(
        {
            "a range of replicas needs enableInTreeAutoscaling": any(ranges) and not is_on,
            "enableInTreeAutoscaling needs a range of replicas": is_on and not any(ranges),
            "RAY_enable_autoscaler_v2 is set by the operator alone": (
                "RAY_enable_autoscaler_v2" in environment
            ),
            "autoscalerOptions.version is v2": is_on and options.get("version") != "v2",
            "autoscalerOptions.securityContext is that of all containers": is_on
            and not (options.get("securityContext") or {}).get("readOnlyRootFilesystem"),
            "restartPolicy is Never or unset with the autoscaler": is_on
            and any(pod.get("restartPolicy", "Never") != "Never" for pod in pods),
            "the head has the autoscaler's service account and its token": is_on
            and not (
                head.get("serviceAccountName") == "ray-autoscaler"
                and head.get("automountServiceAccountToken")
            ),
            "no token of Kubernetes is mounted without the autoscaler": not is_on
            and any(pod.get("automountServiceAccountToken") is not False for pod in pods),
        }
    )


def pod_templates(document: Document) -> Iterator[tuple[str, Document]]:
    """(where, {metadata, spec}) of every pod that `document` makes, whatever its kind."""

    def search(node: Any, where: str) -> Iterator[tuple[str, Document]]:
        if isinstance(node, list):
            for index, each in enumerate(node):
                yield from search(each, f"{where}[{index}]")
        elif isinstance(node, dict):
            if isinstance(node.get("spec"), dict) and "containers" in node["spec"]:
                yield where, {key: node[key] for key in node if key not in ("apiVersion", "kind")}
            else:
                for key, each in node.items():
                    yield from search(each, f"{where}.{key}")

    name = document.get("metadata", {}).get("name")
    return search(document, f"{document.get('kind')}/{name}")


def containers(pod: Document) -> list[Document]:
    """All of a pod's containers."""
    kinds = ("initContainers", "containers", "ephemeralContainers")
    return [each for kind in kinds for each in pod["spec"].get(kind) or []]


def pod_security_faults(documents: list[Document]) -> list[str]:
    """Where a pod breaks the Pod Security Standard `restricted`, or may write to its root."""
    found = []
    for where, pod in (one for document in documents for one in pod_templates(document)):
        spec = pod["spec"]
        shared = spec.get("securityContext") or {}
        found += [
            f"{where}: {key} is on"
            for key in ("hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace")
            if spec.get(key)
        ]
        for volume in spec.get("volumes") or []:
            kinds = set(volume) - {"name"} - VOLUMES
            found += [f"{where}: volume {volume['name']} is a {kind}" for kind in kinds]
        for container in containers(pod):
            wrong = _container_faults(container, shared)
            found += [f"{where}, container {container['name']}: {fault}" for fault in wrong]
    return found


def _container_faults(container: Document, shared: Document) -> list[str]:
    own = container.get("securityContext") or {}
    both = shared | own  # a container's setting goes before its pod's
    capabilities = own.get("capabilities") or {}
    rules: dict[str, Callable[[], bool]] = {
        "runAsNonRoot is not true": lambda: both.get("runAsNonRoot") is not True,
        "runAsUser is root": lambda: both.get("runAsUser") == 0,
        "seccompProfile is not RuntimeDefault": lambda: (
            both.get("seccompProfile", {}).get("type") != "RuntimeDefault"
        ),
        "allowPrivilegeEscalation is not false": lambda: (
            own.get("allowPrivilegeEscalation") is not False
        ),
        "privileged is on": lambda: bool(own.get("privileged")),
        "capabilities do not drop ALL": lambda: "ALL" not in capabilities.get("drop", []),
        "capabilities are added": lambda: bool(capabilities.get("add")),
        "procMount is set": lambda: own.get("procMount", "Default") != "Default",
        "a hostPort is open": lambda: any(
            "hostPort" in port for port in container.get("ports") or []
        ),
        # beyond the standard
        "readOnlyRootFilesystem is not true": lambda: own.get("readOnlyRootFilesystem") is not True,
    }
    return [rule for rule, is_broken in rules.items() if is_broken()]
