"""All that is checked of a platform and of a run without a cluster: lists of faults, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import kubernetes_validate

from pipeline.kubernetes import rules
from pipeline.kubernetes.rules import Document, pod_security_faults

from . import agreement, network, operator
from .containers import container_faults, storage_faults
from .documents import name_of, of_kind, pods
from .references import other_faults, reference_faults, secret_faults, selection_faults
from .schemas import Crds, core_schema_faults, ray_schema_faults

KUBERNETES = ["1.29", kubernetes_validate.latest_version()]
"""The oldest version that k8s/README.md names, and the newest that there are schemas for."""


def platform_checks(found: list[Document]) -> dict[str, Callable[[], list[str]]]:
    """Of a rendered overlay."""
    return {
        "core schema": lambda: [
            fault for version in KUBERNETES for fault in core_schema_faults(found, version)
        ],
        "namespace": lambda: namespace_faults(found),
        "pod security": lambda: pod_security_faults(found),
        "references": lambda: [*reference_faults(found), *other_faults(found)],
        "secrets": lambda: secret_faults(found),
        "selection": lambda: selection_faults(found, expects_runs=True),
        "containers": lambda: container_faults(found),
        "storage": lambda: storage_faults(found),
        "mlflow": lambda: agreement.mlflow_faults(found),
        "schedule": lambda: agreement.schedule_faults(found),
        "network": lambda: network.faults(found, []),
    }


def run_checks(
    run: list[Document], platform: list[Document], folder: Path, crds: Crds
) -> dict[str, Callable[[], list[str]]]:
    """Of a run beside its platform; `folder` takes its files."""

    def expanded() -> list[Document]:
        return [pod for job in of_kind(run, "RayJob") for pod in operator.expand(job)]

    return {
        "rules": lambda: rules.faults(run),
        "core schema": lambda: [
            fault
            for version in KUBERNETES
            for fault in core_schema_faults([*run, *expanded()], version)
        ],
        "ray schema": lambda: ray_schema_faults(run, crds),
        "pod security": lambda: pod_security_faults(expanded()),
        "references": lambda: reference_faults([*platform, *run, *expanded()]),
        "secrets": lambda: secret_faults(run),
        "containers": lambda: container_faults(expanded()),
        "storage": lambda: storage_faults(expanded()),
        "agreement": lambda: agreement.run_faults(run, platform, folder),
        "hook": lambda: agreement.hook_faults(run),
        "network": lambda: network.faults(platform, expanded()),
    }


def namespace_faults(found: list[Document]) -> list[str]:
    """Namespaces that let other pods in, and objects outside of the one."""
    faults = []
    for document in of_kind(found, "Namespace"):
        labels = document["metadata"].get("labels", {})
        faults += [
            f"{name_of(document)}: pod-security.kubernetes.io/{mode} is not restricted"
            for mode in ("enforce", "warn", "audit")
            if labels.get(f"pod-security.kubernetes.io/{mode}") != "restricted"
        ]
    own = {each["metadata"].get("namespace") for each in of_kind(found, "Deployment")}
    labelled = [(name_of(each), each) for each in found] + pods(found)
    for where, each in labelled:
        labels = each["metadata"].get("labels", {})
        if labels.get("app.kubernetes.io/part-of") != "pipeline":
            faults.append(f"{where}: without the common label")
    names = [(name_of(each), each["metadata"].get("namespace")) for each in found]
    faults += [f"{name}: twice" for name in sorted({n for n in names if names.count(n) > 1})]
    faults += [
        f"{name}: in the namespace {where}"
        for name, where in names
        if where is not None and {where} != own
    ]
    return faults
