"""What can be said about Kubernetes manifests without a cluster.

Each check takes the documents of one render and returns its faults, one sentence each; an empty
list means that it found none. What the operator or the API server would only say later, or
nowhere, is said here.
"""

from __future__ import annotations

import ipaddress
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

Document = dict[str, Any]
Crds = Mapping[tuple[str, str], Document]  # (apiVersion, kind) -> openAPIV3Schema

# Secrets that an administrator makes by hand, because no Secret belongs in git: name -> keys.
ADMIN_SECRETS = {"mlflow-database": {"uri", "password"}}


# ------------------------------------------------------------------------------ reading


class RenderError(Exception):
    """kustomize refused a folder."""


class DuplicateKeyError(Exception):
    """A mapping names a key twice, and YAML readers keep one of the two silently."""


class _UniqueKeyLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise DuplicateKeyError(f"{key!r} twice in one mapping{key_node.start_mark}")
            seen.add(key)
        return super().construct_mapping(node, deep)


def documents(text: str) -> list[Document]:
    """The YAML documents of `text`; a key that a mapping names twice raises."""
    return [each for each in yaml.load_all(text, Loader=_UniqueKeyLoader) if each is not None]


def find_kubectl() -> str | None:
    """The kubectl on the path, or the one installed beside this Python."""
    beside = Path(sys.executable).parent / "kubectl"
    return shutil.which("kubectl") or (str(beside) if beside.is_file() else None)


def render(kubectl: str, folder: Path) -> list[Document]:
    """What `kubectl apply -k folder` would send to the cluster."""
    done = subprocess.run(
        [kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RenderError(done.stderr.strip())
    return documents(done.stdout)


def read_crds(folder: Path) -> Crds:
    """The schemas in `folder`'s files: {"kind": ..., "openAPIV3Schema": {...}} of ray.io/v1."""
    files = [json.loads(path.read_text()) for path in sorted(folder.glob("*.v1.json"))]
    return {("ray.io/v1", each["kind"]): each["openAPIV3Schema"] for each in files}


def name_of(document: Document) -> str:
    return f"{document.get('kind')}/{document.get('metadata', {}).get('name')}"


# ------------------------------------------------------------------------------ schemas

_KEPT = {
    *("type", "enum", "pattern", "minimum", "maximum", "minLength", "maxLength"),
    *("minItems", "maxItems", "uniqueItems", "minProperties", "maxProperties"),
}
_HANDLED = {
    *("properties", "required", "items", "additionalProperties", "nullable", "format"),
    *("default", "description", "title", "example"),
}
_INTEGERS = {"int32": 31, "int64": 63}


def strict(schema: Document) -> Document:
    """The JSON Schema of a CRD's schema that refuses what the API server would silently drop.

    Left out: `x-kubernetes-validations` (rules in CEL), list-map keys, formats of strings. A
    keyword that is not known here raises ValueError.
    """
    out: Document = {key: schema[key] for key in _KEPT if key in schema}
    known = _KEPT | _HANDLED
    if schema.get("x-kubernetes-int-or-string"):
        out["type"] = ["integer", "string"]
        known |= {"anyOf"}  # says the same
    if strangers := [key for key in schema.keys() - known if not key.startswith("x-kubernetes-")]:
        raise ValueError(f"keywords of a CRD schema that are not translated: {strangers}")
    if schema.get("format") in _INTEGERS:
        limit = 2 ** _INTEGERS[schema["format"]]
        out["minimum"] = max(out.get("minimum", -limit), -limit)
        out["maximum"] = min(out.get("maximum", limit - 1), limit - 1)
    if "items" in schema:
        out["items"] = strict(schema["items"])
    properties = schema.get("properties", {})
    if properties:
        out["properties"] = {key: strict(each) for key, each in properties.items()}
    # A default is filled in before validation, so that the field may be left out.
    out["required"] = [
        key for key in schema.get("required", []) if "default" not in properties.get(key, {})
    ]
    extra = schema.get("additionalProperties")
    if isinstance(extra, dict):
        out["additionalProperties"] = strict(extra)
    elif schema.get("type") == "object" and not (
        extra is True or schema.get("x-kubernetes-preserve-unknown-fields")
    ):
        out["additionalProperties"] = False
    if schema.get("nullable"):
        out = {"anyOf": [out, {"type": "null"}]}
    return out


def _resource_schema(schema: Document) -> Document:
    """`strict`, and what the API server itself adds to every custom resource."""
    out = strict(schema)
    fields = ("apiVersion", "kind", "metadata")
    out["properties"] |= {"apiVersion": {"type": "string"}, "kind": {"type": "string"}}
    out["properties"]["metadata"] = {"type": "object"}  # checked as a core object's metadata
    out["required"] = [*out["required"], *(key for key in fields if key not in out["required"])]
    return out


def _core_faults(document: Document, version: str) -> list[str]:
    try:
        kubernetes_validate.validate(document, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        where = ".".join(str(each) for each in error.path)
        return [f"{name_of(document)}: {where}: {error.message} (Kubernetes {version})"]
    except kubernetes_validate.SchemaNotFoundError:
        kind = f"{document.get('apiVersion')} {document.get('kind')}"
        return [f"{name_of(document)}: unknown kind {kind} (Kubernetes {version})"]
    return []


def is_rays(document: Document) -> bool:
    return str(document.get("apiVersion")).partition("/")[0] == "ray.io"


def core_schema_faults(found: list[Document], version: str) -> list[str]:
    """Unknown kinds, and fields that are unknown, missing or mistyped, of all but Ray's kinds.

    Ray's pods are looked at here too, as the Pods that will be made of them, and so is every
    object's metadata, which a CRD's schema says nothing about.
    """
    faults = []
    for document in found:
        if not is_rays(document):
            faults += _core_faults(document, version)
            continue
        lone = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": document.get("metadata")}
        faults += _core_faults(lone, version)
        for where, template in pod_templates(document):
            pod = {"apiVersion": "v1", "kind": "Pod", **template}
            faults += [f"{where}: {each}" for each in _core_faults(pod, version)]
    return faults


def ray_schema_faults(found: list[Document], crds: Crds) -> list[str]:
    """Unknown kinds of ray.io, and fields that are unknown, missing or mistyped."""
    faults = []
    for document in filter(is_rays, found):
        kind = (document["apiVersion"], document["kind"])
        if kind not in crds:
            faults.append(f"{name_of(document)}: unknown kind {' '.join(kind)}")
            continue
        validator = jsonschema.Draft202012Validator(_resource_schema(crds[kind]))
        faults += [
            f"{name_of(document)}: {'.'.join(map(str, error.path))}: {error.message}"
            for error in validator.iter_errors(document)
        ]
    return faults


# ------------------------------------------------------------------------------ Ray's rules

_SUBMISSION_MODES = {"K8sJobMode", "HTTPMode", "InteractiveMode"}


def rayjob_faults(found: list[Document]) -> list[str]:
    """What the operator would refuse after the fact, and what this project asks of every run."""
    faults = []
    for document in found:
        if document.get("kind") != "RayJob":
            continue
        spec = document.get("spec", {})
        cluster = spec.get("rayClusterSpec", {})
        name = document["metadata"]["name"]
        wrong = {
            "a name is at most 47 characters of [a-z0-9-] and starts with a letter": not (
                re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", name)
            ),
            # The CRD lists no modes, and SidecarMode cannot run under Pod Security restricted.
            f"submissionMode is one of {sorted(_SUBMISSION_MODES)}": (
                spec.get("submissionMode") not in _SUBMISSION_MODES
            ),
            "entrypoint is one plain command, since a shell reads it: no && ; | < > $ or `": bool(
                re.search(r"[&;|<>$`\n]", spec.get("entrypoint", "").strip())
            )
            or not spec.get("entrypoint"),
            "submitterPodTemplate is given: the operator's own fails Pod Security restricted": (
                spec.get("submissionMode") == "K8sJobMode" and "submitterPodTemplate" not in spec
            ),
            "ttlSecondsAfterFinished needs shutdownAfterJobFinishes": bool(
                spec.get("ttlSecondsAfterFinished") and not spec.get("shutdownAfterJobFinishes")
            ),
            "activeDeadlineSeconds and preRunningDeadlineSeconds are given": not (
                spec.get("activeDeadlineSeconds") and spec.get("preRunningDeadlineSeconds")
            ),
            "authOptions.mode is token: left out, it means no authentication": (
                cluster.get("authOptions", {}).get("mode") != "token"
            ),
            'head num-cpus is "0": training stays off the head': (
                cluster.get("headGroupSpec", {}).get("rayStartParams", {}).get("num-cpus") != "0"
            ),
        }
        faults += [f"{name_of(document)}: {rule}" for rule, broken in wrong.items() if broken]
    return faults


# ------------------------------------------------------------------------------ pods


def pod_templates(document: Document) -> Iterator[tuple[str, Document]]:
    """(where, {metadata, spec}) of every pod that `document` makes, whatever its kind."""

    def search(node: Any, where: str) -> Iterator[tuple[str, Document]]:
        if isinstance(node, list):
            for index, each in enumerate(node):
                yield from search(each, f"{where}[{index}]")
        elif isinstance(node, dict):
            if isinstance(node.get("spec"), dict) and "containers" in node["spec"]:
                kept = {key: node[key] for key in node if key not in ("apiVersion", "kind")}
                yield where, kept
            else:
                for key, each in node.items():
                    yield from search(each, f"{where}.{key}")

    return search(document, name_of(document))


def pods(found: list[Document]) -> list[tuple[str, Document]]:
    return [pod for document in found for pod in pod_templates(document)]


def containers(pod: Document) -> list[Document]:
    kinds = ("initContainers", "containers", "ephemeralContainers")
    return [each for kind in kinds for each in pod["spec"].get(kind, [])]


_VOLUMES = {
    *("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral"),
    *("persistentVolumeClaim", "projected", "secret"),
}


def pod_security_faults(found: list[Document]) -> list[str]:
    """Where a pod would be refused by the Pod Security Standard `restricted`.

    A namespace that does not enforce the standard is a fault as well.
    """
    faults = []
    for document in found:
        if document.get("kind") == "Namespace":
            labels = document["metadata"].get("labels", {})
            faults += [
                f"{name_of(document)}: pod-security.kubernetes.io/{mode} is not restricted"
                for mode in ("enforce", "warn", "audit")
                if labels.get(f"pod-security.kubernetes.io/{mode}") != "restricted"
            ]
    for where, pod in pods(found):
        spec = pod["spec"]
        shared = spec.get("securityContext", {})
        for key in ("hostNetwork", "hostPID", "hostIPC"):
            if spec.get(key):
                faults.append(f"{where}: {key} is on")
        for volume in spec.get("volumes", []):
            faults += [
                f"{where}: volume {volume['name']} is a {kind}"
                for kind in set(volume) - {"name"} - _VOLUMES
            ]
        for container in containers(pod):
            own = container.get("securityContext", {})
            both = shared | own  # a container's setting goes before its pod's
            capabilities = own.get("capabilities", {})
            wrong = {
                "runAsNonRoot is not true": both.get("runAsNonRoot") is not True,
                "runAsUser is root": both.get("runAsUser") == 0,
                "seccompProfile is not RuntimeDefault": (
                    both.get("seccompProfile", {}).get("type") != "RuntimeDefault"
                ),
                "allowPrivilegeEscalation is not false": (
                    own.get("allowPrivilegeEscalation") is not False
                ),
                "privileged is on": bool(own.get("privileged")),
                "capabilities do not drop ALL": "ALL" not in capabilities.get("drop", []),
                "capabilities are added": bool(capabilities.get("add")),
                "a hostPort is open": any(
                    "hostPort" in port for port in container.get("ports", [])
                ),
                # Beyond the standard, and kept by all of this project's pods:
                "readOnlyRootFilesystem is not true": (
                    own.get("readOnlyRootFilesystem") is not True
                ),
            }
            name = container["name"]
            faults += [f"{where}, container {name}: {rule}" for rule, bad in wrong.items() if bad]
    return faults


# ------------------------------------------------------------------------------ references


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
    keys[("ServiceAccount", "default")] = set()  # every namespace has it
    faults = []
    for where, pod in pods(found):
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


def secret_faults(found: list[Document]) -> list[str]:
    """Secrets with content; a password has no place in a repository."""
    return [
        f"{name_of(document)}: a Secret with data"
        for document in found
        if document.get("kind") == "Secret" and (document.get("data") or document.get("stringData"))
    ]


def selection_faults(found: list[Document]) -> list[str]:
    """Services and policies that select no pod, and ports of Services that no container opens."""
    faults = []
    for document in found:
        spec = document.get("spec", {})
        if document.get("kind") == "Service":
            selector = spec.get("selector", {})
        elif document.get("kind") == "NetworkPolicy":
            selector = spec["podSelector"].get("matchLabels", {})
        else:
            continue
        chosen = [pod for _, pod in pods(found) if selector.items() <= _labels(pod).items()]
        if not chosen:
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


def _labels(pod: Document) -> Document:
    return dict(pod.get("metadata", {}).get("labels", {}))


# The checks that need nothing but the documents.
CHECKS: Mapping[str, Callable[[list[Document]], list[str]]] = {
    "rayjob": rayjob_faults,
    "pod security": pod_security_faults,
    "references": reference_faults,
    "secrets": secret_faults,
    "selection": selection_faults,
}


# ------------------------------------------------------------------------------ network


def may_connect(
    found: list[Document],
    source: Document | str,
    target: Document | str,
    port: int,
    protocol: str = "TCP",
) -> bool:
    """Whether the NetworkPolicies of `found` let `source` open a connection to `target`:`port`.

    An end is an address outside the cluster, or {"namespace": name, "labels": {...}}; "here" is
    the namespace of the policies.
    """
    policies = [each["spec"] for each in found if each.get("kind") == "NetworkPolicy"]

    def allowed(own: Document | str, peer: Document | str, direction: str, peers: str) -> bool:
        if isinstance(own, str) or own["namespace"] != "here":
            return True  # these policies do not govern it
        governing = [
            each
            for each in policies
            if direction in each["policyTypes"] and _selects(each["podSelector"], own["labels"])
        ]
        rules = [rule for each in governing for rule in each.get(direction.lower(), [])]
        return not governing or any(
            _opens(rule, port, protocol)
            and (peers not in rule or any(_matches(each, peer) for each in rule[peers]))
            for rule in rules
        )

    return allowed(source, target, "Egress", "to") and allowed(target, source, "Ingress", "from")


def _selects(selector: Document, labels: Document) -> bool:
    if set(selector) - {"matchLabels"}:
        raise NotImplementedError(f"a selector with {sorted(selector)}")
    return bool(selector.get("matchLabels", {}).items() <= labels.items())


def _opens(rule: Document, port: int, protocol: str) -> bool:
    ports = rule.get("ports")
    return not ports or any(
        each.get("port", port) == port and each.get("protocol", "TCP") == protocol for each in ports
    )


def _matches(peer: Document, end: Document | str) -> bool:
    if "ipBlock" in peer:
        if not isinstance(end, str):
            return False  # some network plugins never match a pod by its address
        address = ipaddress.ip_address(end)
        inside = address in ipaddress.ip_network(peer["ipBlock"]["cidr"])
        outs = peer["ipBlock"].get("except", [])
        return inside and not any(address in ipaddress.ip_network(out) for out in outs)
    if isinstance(end, str):
        return False
    if "namespaceSelector" in peer:
        name = {"kubernetes.io/metadata.name": end["namespace"]}
        if not _selects(peer["namespaceSelector"], name):
            return False
    elif end["namespace"] != "here":
        return False
    return _selects(peer.get("podSelector", {}), end["labels"])
