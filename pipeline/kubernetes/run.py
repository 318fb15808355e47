"""A run as it is to be: what is trained, and on which platform."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from pipeline.cluster.package import Package, entrypoint
from pipeline.errors import UsageError
from pipeline.files.store import is_uri
from pipeline.kubernetes.platform import Platform, amount
from pipeline.redact import redact
from pipeline.spec import JobSpec

RUNS_MOUNT = "/runs"
DATA_MOUNT = "/data"
MOST_NAME = 47
"""Characters of a RayJob's name: the operator appends to it."""
CACHE_SHARE = 0.8
"""Of a pod's disk for prepared rows, that may be used: beyond its size the pod is evicted."""


@dataclass(frozen=True)
class Limits:
    """How long and how often a run is tried."""

    active_seconds: int = 24 * 3600
    """Of one attempt, from its creation to its end."""
    waiting_seconds: int = 900
    """Of these, until it trains: for nodes, images, volumes."""
    retries: int = 2
    """New Ray clusters after one that failed; each resumes."""
    ttl_seconds: int = 30
    """Until the Ray cluster is deleted after the end."""


@dataclass(frozen=True)
class Run:
    """What is to be trained, and where."""

    spec: JobSpec
    package: Package
    overrides: tuple[str, ...]
    imports: tuple[str, ...]
    platform: Platform
    limits: Limits = Limits()
    fresh: bool = False
    source: Mapping[str, str] | None = None
    """Who asks for it, from which code."""

    @cached_property
    def identity(self) -> str:
        """What tells the job's spec, data and code from others, whatever it runs on."""
        parts = [self.spec.digest, self.storage, self.package.sha256]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @cached_property
    def name(self) -> str:
        """Of the RayJob and the ConfigMap: the job's, and a mark of that and of what it trains."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.spec.name.lower()).strip("-") or "job"
        if not slug[0].isalpha():
            slug = f"job-{slug}"
        mark = hashlib.sha256(json.dumps([self.spec.name, self.identity]).encode()).hexdigest()
        return f"{slug[: MOST_NAME - 9].rstrip('-')}-{mark[:8]}"

    @property
    def storage(self) -> str:
        """Where the run's folder is: the spec's, if the pods have it. Raises UsageError."""
        own, theirs = self.spec.storage, self.platform.storage
        if is_uri(own):
            if not (self.platform.storage_secret or is_uri(theirs)):
                raise UsageError(
                    f"storage: {redact(own)}: the platform lets no run reach an object store "
                    "(component s3)"
                )
            return own
        return own if own.startswith(f"{theirs}/") else theirs

    @property
    def notes(self) -> list[str]:
        """What of the spec does not hold on Kubernetes, or may not be there."""
        notes = []
        if not is_uri(self.spec.storage) and self.spec.storage not in ("runs", self.storage):
            notes.append(f"storage: {self.storage} in place of {self.spec.storage}")
        mounts = [RUNS_MOUNT] * bool(self.platform.runs_claim)
        mounts += [DATA_MOUNT] * bool(self.platform.data_claim)
        names = {**self.package.left_out, "checkpoint.copy_to": self.spec.checkpoint.copy_to or ""}
        for key, name in ((key, one) for key, text in names.items() for one in text.split(", ")):
            on_volume = any(name.startswith(f"{mount}/") for mount in mounts)
            if name.startswith("/") and not on_volume:
                having = " or ".join(mounts) or "which the platform has none of"
                notes.append(f"{key}: {name} is on no volume of the pods ({having})")
        return notes

    @property
    def image(self) -> str:
        """Of head and workers, which must have the same torch."""
        return self.platform.gpu_image if self.spec.workers.gpu else self.platform.image

    @property
    def command(self) -> str:
        """What the head runs, quoted: shells of the submitter and of the head read it."""
        values = [*self.overrides, f"storage={self.storage}"]
        values.append(f"cache.most_gib={amount(self.platform.cache_size) * CACHE_SHARE / 2**30:g}")
        return entrypoint(self.package, values, self.imports, self.fresh)
