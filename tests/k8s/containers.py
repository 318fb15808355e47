"""What a container and its pod need so that they run here, and no schema says."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from pipeline.kubernetes.platform import amount
from pipeline.kubernetes.rules import Document, containers

from .documents import of_kind, pods

IMAGE = re.compile(r"[\w./-]+(:[\w][\w.-]*)?(@sha256:[0-9a-f]{64})?")


def container_faults(found: list[Document]) -> list[str]:
    """Of all pods: resources, images, mounts, volumes, probes, lists with a name twice."""
    return [f"{where}: {fault}" for where, pod in pods(found) for fault in _pod_faults(pod)]


def storage_faults(found: list[Document]) -> list[str]:
    """Volumes that lose data, or that a pod cannot write to."""
    faults = []
    for claim in of_kind(found, "PersistentVolumeClaim"):
        size = claim["spec"]["resources"]["requests"]["storage"]
        if not _is_quantity(size):
            faults.append(f"{claim['metadata']['name']}: {size!r} is not a size")
    for where, pod in pods(found):
        claims = [v for v in pod["spec"].get("volumes", []) if "persistentVolumeClaim" in v]
        if claims and not pod["spec"].get("securityContext", {}).get("fsGroup"):
            faults.append(f"{where}: a volume and no fsGroup: the user may not write to it")
        for container in containers(pod):
            for mount in container.get("volumeMounts", []):
                if mount["mountPath"] in ("/runs", "/tmp", "/cache", "/artifacts") and (
                    mount.get("readOnly")
                ):
                    faults.append(f"{where}: {mount['mountPath']} is read-only")
    for deployment in of_kind(found, "Deployment"):
        spec = deployment["spec"]
        volumes = spec["template"]["spec"].get("volumes", [])
        if any("persistentVolumeClaim" in each for each in volumes) and (
            spec.get("replicas", 1) != 1 or spec.get("strategy", {}).get("type") != "Recreate"
        ):
            name = deployment["metadata"]["name"]
            faults.append(f"{name}: one replica and Recreate, or two would share a volume")
    return faults


def _pod_faults(pod: Document) -> Iterator[str]:
    spec = pod["spec"]
    yield from _twice(spec, "volumes", "name")
    yield from _twice(spec, "containers", "name")
    yield from _twice(spec, "tolerations", None)
    for volume in spec.get("volumes", []):
        if "emptyDir" in volume and not (
            volume["emptyDir"].get("sizeLimit") or volume["name"] == "ray-logs"
        ):
            yield f"volume {volume['name']} has no sizeLimit"
        size = volume.get("emptyDir", {}).get("sizeLimit", "1")
        if not _is_quantity(size):
            yield f"volume {volume['name']}: {size!r} is not a size"
    for container in containers(pod):
        name = container["name"]
        yield from (f"container {name}: {fault}" for fault in _container_faults(container))


def _container_faults(container: Document) -> Iterator[str]:
    yield from _twice(container, "env", "name")
    yield from _twice(container, "ports", "name")
    yield from _twice(container, "volumeMounts", "mountPath")
    image = container.get("image", "")
    match = IMAGE.fullmatch(image)
    if not match or not (match[1] or match[2]) or image.endswith(":latest"):
        yield f"image {image!r} has no tag, or `latest`"
    resources = container.get("resources", {})
    requests, limits = resources.get("requests", {}), resources.get("limits", {})
    for key, text in [*requests.items(), *limits.items()]:
        if not _is_quantity(text):
            yield f"{key}: {text!r} is not a quantity"
            return
    if "cpu" not in requests:
        yield "no request of cpu"
    if "memory" not in limits or requests.get("memory") != limits["memory"]:
        yield "memory's limit is not its request"
    for key in {*requests, *limits}:
        if "/" in key and requests.get(key) != limits.get(key):
            yield f"{key}: its limit is not its request"
    mounted = {mount["mountPath"] for mount in container.get("volumeMounts", [])}
    if not mounted & {"/tmp"}:
        yield "/tmp is not mounted, and the root file system is read-only"
    names = {port.get("name") for port in container.get("ports", [])}
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = container.get(kind, {})
        port = probe.get("httpGet", {}).get("port")
        if isinstance(port, str) and port not in names:
            yield f"{kind}: there is no port {port!r}"


def _twice(owner: Document, key: str, name: str | None) -> Iterator[str]:
    entries = owner.get(key) or []
    marks = Counter(str(each.get(name)) if name else str(each) for each in entries)
    yield from (f"{key}: {mark} twice" for mark, count in marks.items() if count > 1)


def _is_quantity(text: object) -> bool:
    try:
        amount(str(text))
    except ValueError:
        return False
    return True
