"""Names and addresses as MLflow takes them; nothing here imports it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from pipeline import spec as specs
from pipeline.errors import UsageError
from pipeline.redact import redact
from pipeline.spec import JobSpec

SCHEMES = ("databricks", "file", "http", "https", "mssql", "mysql", "postgresql", "sqlite")
"""Schemes of tracking URIs that MLflow takes; plugins add theirs."""
LONGEST_KEY = 250
PARENT = "mlflow.parentRunId"
"""Tag of a run: the run above it on the page."""


def tracking_uri(storage: Path) -> str:
    """MLflow's address: the environment's, or a SQLite file beside the runs.

    Raises UsageError for one that MLflow cannot take.
    """
    uri = environment_uri()
    scheme = uri.partition(":")[0].partition("+")[0].lower() if ":" in uri else ""
    if scheme and scheme not in SCHEMES:
        added = {entry.name for entry in entry_points(group="mlflow.tracking_store")}
        if scheme not in added:
            known = ", ".join(sorted({*SCHEMES, *added}))
            raise UsageError(f"MLFLOW_TRACKING_URI: MLflow knows no {scheme}:// (but {known})")
    if not uri and set("?%") & set(str(storage)):
        raise UsageError(
            f"storage: {storage} has a '?' or '%', which MLflow cannot have in the address of a "
            "SQLite file: take another folder, or set MLFLOW_TRACKING_URI"
        )
    return uri or f"sqlite:///{storage / 'mlflow.db'}"


def environment_uri() -> str:
    """The environment's address of MLflow, which may hold a password; empty without one."""
    return os.environ.get("MLFLOW_TRACKING_URI", "")


def with_password(uri: str) -> str:
    """MLflow's address as it can be used: records hide passwords, the environment has them."""
    return environment_uri() if redact(environment_uri()) == uri else uri


def mlflow_key(name: str) -> str:
    """The name of a metric or param as MLflow takes it: itself, or what is left with a mark.

    MLflow refuses some characters, more than 250 of them, and what is not a plain path. The mark
    keeps names apart that would become one.
    """
    parts = re.sub(r"[^\w .:/-]", "_", name).split("/")
    key = "/".join("_" if part in ("", ".", "..") else part for part in parts)
    if key == name and len(key) <= LONGEST_KEY:
        return name
    mark = hashlib.sha256(name.encode()).hexdigest()[:6]
    return f"{key[: LONGEST_KEY - len(mark) - 1]}-{mark}"


def params(spec: JobSpec) -> dict[str, str]:
    """The spec as MLflow's params, without what is not set or empty; `spec.yaml` has everything."""
    flat = specs.flat(spec)
    is_set = {key: value for key, value in flat.items() if value not in (None, [], {}, ())}
    return {mlflow_key(key): _text(value) for key, value in is_set.items()}


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list | dict) else str(value)
