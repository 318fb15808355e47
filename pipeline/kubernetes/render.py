"""From a job's file to the manifests of its run, as text that a cluster takes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline import plugins
from pipeline.cluster.package import pack
from pipeline.errors import PipelineError, UsageError
from pipeline.kubernetes import rules
from pipeline.kubernetes.manifests import Document, manifests
from pipeline.kubernetes.platform import Platform
from pipeline.kubernetes.run import Limits, Run
from pipeline.launch.run import components
from pipeline.spec import JobSpec, load
from pipeline.spec.job import Dumper
from pipeline.spec.sections import seconds_of

MARGIN_SECONDS = 3600
"""Beyond `training.time_limit`, for the start, restarts and the record."""
LEAST_SECONDS = 300
BREAKS = re.compile("[\x85\u2028\u2029]")
"""Characters that YAML takes for ends of lines."""


def prepare(
    path: str,
    overrides: Sequence[str],
    values: Mapping[str, Any],
    imports: Sequence[str],
    platform: Platform,
    *,
    timeout: str | None = None,
    retries: int = Limits.retries,
    fresh: bool = False,
    source: Mapping[str, str] | None = None,
) -> Run:
    """A job as it would run on a platform.

    `overrides` are the texts of which `values` are the meaning. Raises SpecError and UsageError.
    """
    modules = plugins.load(list(imports))
    spec = load(path, values)
    modules = plugins.homes(components(spec), modules)
    package = pack(Path(path), spec, modules)
    if fresh and platform.queue:
        raise UsageError("--fresh: a run that its queue suspends would start anew each time")
    limits = _limits(spec, timeout, 0 if fresh else retries)  # a retry would start anew, too
    return Run(spec, package, tuple(overrides), tuple(imports), platform, limits, fresh, source)


def _limits(spec: JobSpec, timeout: str | None, retries: int) -> Limits:
    """Deadlines from the spec, where the command names none."""
    active, waiting = float(Limits.active_seconds), float(Limits.waiting_seconds)
    if spec.workers.wait:
        waiting = seconds_of(spec.workers.wait)
    if timeout:
        active = seconds_of(timeout)
    elif spec.training.time_limit:
        active = seconds_of(spec.training.time_limit) + waiting + MARGIN_SECONDS
    else:
        active = max(active, 2 * waiting)
    if active < LEAST_SECONDS:
        raise UsageError(f"--timeout: nodes, images and Ray alone take {LEAST_SECONDS} s or more")
    if spec.workers.wait and waiting >= active:
        raise UsageError(f"--timeout {timeout}: workers.wait is {spec.workers.wait} already")
    waiting = max(LEAST_SECONDS / 2, min(waiting, active - LEAST_SECONDS / 2))
    return Limits(round(active), round(waiting), retries)


def checked(run: Run) -> list[Document]:
    """A run's manifests. Raises PipelineError for a fault of ours: they would not run."""
    documents = manifests(run)
    if wrong := rules.faults(documents):
        raise PipelineError("\n  ".join(["these manifests would not run:", *wrong]))
    return documents


def to_yaml(documents: list[Document]) -> str:
    """Manifests as text."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=100, allow_unicode=True)


class _Dumper(Dumper):
    """Text of several lines as such, and no anchors, which other tools lose."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = "|" if "\n" in text else None
    if BREAKS.search(text):
        style = '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
