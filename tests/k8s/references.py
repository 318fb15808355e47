"""Names in documents that nothing bears, and selectors that select nothing."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.kubernetes.rules import Document, containers

from .documents import name_of, pods

# Secrets that an administrator makes by hand, because no Secret belongs in git: name -> keys.
ADMIN_SECRETS = {
    "mlflow-database": {"uri", "password"},
    "mlflow-auth": {"basic_auth.ini", "admin-password", "session-key"},
    "mlflow-client": {"MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"},
    "object-store": {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"},
    "registry": {".dockerconfigjson"},
    "mlflow-tls": {"tls.crt", "tls.key"},
}


ADMIN_FILES = {"scheduled-job": {"job.yaml"}}
"""ConfigMaps that an administrator makes, and their keys."""


def _named_objects(pod: Document) -> Iterator[tuple[str, str, str | None]]:
    """(kind, name, key or None) of every object that a pod cannot start without."""
    spec = pod["spec"]
    yield "ServiceAccount", spec.get("serviceAccountName", "default"), None
    for each in spec.get("imagePullSecrets", []):
        yield "Secret", each["name"], None
    for volume in spec.get("volumes", []):
        for source in [volume, *volume.get("projected", {}).get("sources", [])]:
            if "configMap" in source:
                yield "ConfigMap", source["configMap"]["name"], None
            if "secret" in source:
                secret = source["secret"]
                yield "Secret", secret.get("secretName") or secret["name"], None
        if "persistentVolumeClaim" in volume:
            yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"], None
    for container in containers(pod):
        for each in container.get("envFrom", []):
            for kind, field in (("ConfigMap", "configMapRef"), ("Secret", "secretRef")):
                if field in each:
                    yield kind, each[field]["name"], None
        for each in container.get("env", []):
            source = each.get("valueFrom", {})
            for kind, field in (("ConfigMap", "configMapKeyRef"), ("Secret", "secretKeyRef")):
                if field in source:
                    yield kind, source[field]["name"], source[field]["key"]


def reference_faults(found: list[Document]) -> list[str]:
    """Names in pods that nothing bears: objects, keys, volumes."""
    keys = {
        (document["kind"], document["metadata"]["name"]): set(document.get("data") or {})
        for document in found
    }
    keys |= {("Secret", name): each for name, each in ADMIN_SECRETS.items()}
    keys |= {("ConfigMap", name): each for name, each in ADMIN_FILES.items()}
    keys[("Secret", "cluster")] = {"auth_token"}  # made by the operator for each Ray cluster
    keys[("ServiceAccount", "default")] = set()  # every namespace has it
    faults = []
    for where, pod in pods(found):
        if missing := _missing_pull_secrets(pod, found):
            faults.append(f"{where}: pulls its images without {missing}")
        for kind, name, key in _named_objects(pod):
            if (kind, name) not in keys:
                faults.append(f"{where}: there is no {kind} {name!r}")
            elif key is not None and key not in keys[kind, name]:
                faults.append(f"{where}: {kind} {name!r} has no key {key!r}")
        volumes = {volume["name"] for volume in pod["spec"].get("volumes", [])}
        faults += [
            f"{where}, container {container['name']}: there is no volume {mount['name']!r}"
            for container in containers(pod)
            for mount in container.get("volumeMounts", [])
            if mount["name"] not in volumes
        ]
    return faults


def _missing_pull_secrets(pod: Document, found: list[Document]) -> list[str]:
    """Of a pod with an image of the platform's own, which neither it nor its account has."""
    maps = [one["data"] for one in found if one["metadata"].get("name") == "platform"]
    settings = maps[0] if maps else {}
    ours = {settings.get(key) for key in ("image", "gpu_image", "manifest_mlflow_image")}
    if not ours & {each["image"] for each in containers(pod)}:
        return []
    account = pod["spec"].get("serviceAccountName")
    accounts = [
        one
        for one in found
        if one["kind"] == "ServiceAccount" and one["metadata"]["name"] == account
    ]
    having = [pod["spec"], *accounts]
    names = {each["name"] for one in having for each in one.get("imagePullSecrets", [])}
    secret = settings.get("image_pull_secret")
    return [secret] if secret and secret not in names else []


def secret_faults(found: list[Document]) -> list[str]:
    """Secrets with content; a password has no place in a repository."""
    return [
        f"{name_of(document)}: a Secret with data"
        for document in found
        if document.get("kind") == "Secret" and (document.get("data") or document.get("stringData"))
    ]


def selection_faults(found: list[Document], expects_runs: bool = False) -> list[str]:
    """Services, policies and budgets that select no pod, and ports of Services that none opens.

    A platform `expects_runs`, whose pods are not among its documents.
    """
    faults = []
    runs = [{"app.kubernetes.io/component": name} for name in ("ray", "submitter")]
    runs += [{"app.kubernetes.io/component": "ray", "ray.io/node-type": "head"}]
    for document in found:
        spec = document.get("spec", {})
        if document.get("kind") == "Service":
            selector = spec.get("selector", {})
        elif document.get("kind") == "NetworkPolicy":
            selector = spec["podSelector"].get("matchLabels", {})
        elif document.get("kind") == "PodDisruptionBudget":
            selector = spec["selector"].get("matchLabels", {})
        else:
            continue
        chosen = [pod for _, pod in pods(found) if selector.items() <= _labels(pod).items()]
        if not chosen and not (expects_runs and selector in runs):
            faults.append(f"{name_of(document)}: selects no pod: {selector}")
        if document["kind"] == "Service":
            opened = {
                value
                for pod in chosen
                for container in containers(pod)
                for port in container.get("ports", [])
                for value in (port.get("name"), port["containerPort"])
            }
            faults += [
                f"{name_of(document)}: no container opens port {port.get('targetPort')!r}"
                for port in spec["ports"]
                if port.get("targetPort", port["port"]) not in opened
            ]
    return faults


def other_faults(found: list[Document]) -> list[str]:
    """Names in what is beside pods: backends, ports of monitors, queues, roles."""
    names = {(one["kind"], one["metadata"]["name"]) for one in found}
    faults = []

    def expect(document: Document, kind: str, name: str) -> None:
        if (kind, name) not in names:
            faults.append(f"{name_of(document)}: there is no {kind} {name!r}")

    for document in found:
        kind, spec = document["kind"], document.get("spec", {})
        if kind == "Ingress":
            for rule in spec["rules"]:
                for path in rule["http"]["paths"]:
                    service = path["backend"]["service"]
                    expect(document, "Service", service["name"])
                    opened = {
                        port.get("name")
                        for one in found
                        if name_of(one) == f"Service/{service['name']}"
                        for port in one["spec"]["ports"]
                    }
                    if service["port"]["name"] not in opened:
                        faults.append(f"{name_of(document)}: no port {service['port']['name']!r}")
        elif kind == "PodMonitor":  # of runs, whose pods are not among the platform's documents
            if spec["selector"]["matchLabels"] != {"app.kubernetes.io/component": "ray"}:
                faults.append(f"{name_of(document)}: selects no pod")
            if {one["port"] for one in spec["podMetricsEndpoints"]} != {"metrics"}:
                faults.append(f"{name_of(document)}: pods of runs open the port 'metrics'")
            if not all(one.get("honorLabels") for one in spec["podMetricsEndpoints"]):
                faults.append(f"{name_of(document)}: the gauges' label `job` is overwritten")
        elif kind == "LocalQueue":
            expect(document, "ClusterQueue", spec["clusterQueue"])
        elif kind == "ClusterQueue":
            for flavor in (one for group in spec["resourceGroups"] for one in group["flavors"]):
                expect(document, "ResourceFlavor", flavor["name"])
        elif kind == "RoleBinding":
            expect(document, document["roleRef"]["kind"], document["roleRef"]["name"])
            for subject in document["subjects"]:
                expect(document, subject["kind"], subject["name"])
        elif document["metadata"]["name"] == "platform":
            data = document["data"]
            for key, wanted in (("queue", "LocalQueue"), ("priority", "WorkloadPriorityClass")):
                if data.get("queue") and data.get(key):
                    expect(document, wanted, data[key])
            for key in ("runs_claim", "data_claim"):
                if data.get(key):
                    expect(document, "PersistentVolumeClaim", data[key])
    return faults


def _labels(pod: Document) -> Document:
    return dict(pod.get("metadata", {}).get("labels", {}))
