"""Documents against the schemas of Kubernetes and of KubeRay, as strictly as the API server."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import cel
import jsonschema
import kubernetes_validate

from pipeline.kubernetes.rules import Document, pod_templates

from .documents import name_of

Crds = Mapping[tuple[str, str], Document]  # (apiVersion, kind) -> openAPIV3Schema

# Kinds of other projects, whose schemas are not here.
WITHOUT_SCHEMA = {
    *("ResourceFlavor", "ClusterQueue", "LocalQueue", "WorkloadPriorityClass"),  # Kueue
    *("PodMonitor", "PrometheusRule"),  # the Prometheus operator
}


def read_crds(folder: Path) -> Crds:
    """The schemas in `folder`'s files: {"kind": ..., "openAPIV3Schema": {...}} of ray.io/v1."""
    files = [json.loads(path.read_text()) for path in sorted(folder.glob("*.v1.json"))]
    return {("ray.io/v1", each["kind"]): each["openAPIV3Schema"] for each in files}


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

    Rules in CEL and the keys of lists are checked apart; formats of strings are not. A keyword
    that is not known here raises ValueError.
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
        if not is_rays(document) and document.get("kind") not in WITHOUT_SCHEMA:
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
        faults += [f"{name_of(document)}: {each}" for each in _rule_faults(document, crds[kind])]
    return faults


def _rule_faults(value: Any, schema: Document, where: str = "") -> Iterator[str]:
    """What breaks a schema's rules in CEL, and entries that a list has twice under one key.

    Rules about a change (`oldSelf`) hold of an object that is new.
    """
    for rule in schema.get("x-kubernetes-validations", []):
        if "oldSelf" not in rule["rule"] and not cel.evaluate(rule["rule"], {"self": value}):
            yield f"{where}: {rule.get('message', rule['rule'])}"
    if isinstance(value, dict):
        for key, each in schema.get("properties", {}).items():
            if key in value:
                yield from _rule_faults(value[key], each, f"{where}.{key}")
        extra = schema.get("additionalProperties")
        if isinstance(extra, dict):
            for key in value.keys() - schema.get("properties", {}).keys():
                yield from _rule_faults(value[key], extra, f"{where}.{key}")
    elif isinstance(value, list):
        keys = schema.get("x-kubernetes-list-map-keys")
        marks = [str([each.get(key) for key in keys]) if keys else str(each) for each in value]
        if schema.get("x-kubernetes-list-type") in ("map", "set"):
            twice = {mark for mark in marks if marks.count(mark) > 1}
            yield from (f"{where}: {mark} twice" for mark in sorted(twice))
        for index, each in enumerate(value):
            yield from _rule_faults(each, schema.get("items", {}), f"{where}[{index}]")
