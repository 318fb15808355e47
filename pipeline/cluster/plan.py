"""What submitting a job would do: start, resume, attach to what runs, or tell what it came to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pipeline import plugins
from pipeline.cluster.client import Cluster, Submission
from pipeline.cluster.package import Package, entrypoint, pack
from pipeline.errors import DataError, UsageError
from pipeline.files.store import is_uri
from pipeline.launch.resources import Node, room, shortage
from pipeline.launch.resume import slug_of
from pipeline.launch.run import CHECKED, check, components, seal_of
from pipeline.redact import holds_secret, redact
from pipeline.spec import JobSpec, load
from pipeline.tracking.names import environment_uri

Action = Literal["start", "resume", "attach", "tell"]
STOP_SECONDS = 120
"""After a SIGTERM, for a checkpoint, before Ray kills the command."""
PROGRESS_SECONDS = 2
"""Between lines of progress in the job's log, which whoever follows it sees."""


@dataclass(frozen=True)
class Plan:
    """A job, what it is sent with and to where."""

    cluster: Cluster
    spec: JobSpec
    path: Path
    package: Package
    command: str
    identity: str
    action: Action
    last: Submission | None
    """The newest submission of this very job, if there is one."""
    rivals: list[Submission]
    """Others of its name that run."""
    nodes: list[Node]
    """The cluster's."""
    notes: list[str]
    """What is to be said before."""
    seal: str
    """Of the job as it was checked here; empty if it was not."""

    @property
    def attempt(self) -> int:
        """Which submission of this job it is, from 1."""
        before = self.last.attempt if self.last else 0
        return before + 1 if self.action in ("start", "resume") else before

    @property
    def id(self) -> str:
        """The submission's id, which follows from the job."""
        return f"{slug_of(self.spec.name)}-{self.identity[:8]}-{self.attempt}"

    @property
    def storage(self) -> str:
        """Where the run will be, in words."""
        storage = self.spec.storage
        if is_uri(storage):
            return redact(storage)
        is_own = not Path(storage).is_absolute() and not storage.startswith("~")
        return f"{'~/' if is_own else ''}{storage} on the cluster; all of its nodes have to see it"

    @property
    def variables(self) -> dict[str, str]:
        """The command's environment on the cluster, in which nothing is secret."""
        uri = environment_uri()
        tracking = {"MLFLOW_TRACKING_URI": uri} if uri and not _stays(uri) else {}
        return {
            "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS),
            "PIPELINE_PROGRESS_SECONDS": str(PROGRESS_SECONDS),
            "PIPELINE_SOURCE": "source.json",
            CHECKED: self.seal,
            **tracking,
        }

    @property
    def metadata(self) -> dict[str, str]:
        """What the cluster keeps of the job, for whoever finds it there."""
        return {
            "job": self.spec.name,
            "identity": self.identity,
            "attempt": str(self.attempt),
            "command": self.command,
            "experiment": self.spec.tracking.experiment or self.spec.name,
        }


def make_plan(
    cluster: Cluster,
    path: str,
    overrides: Sequence[str],
    values: Mapping[str, Any],
    imports: Sequence[str],
    fresh: bool,
) -> Plan:
    """Look at the cluster, and check here what would be sent there; nothing is sent.

    `overrides` are the texts of which `values` are the meaning. Raises the errors of `check`.
    """
    nodes = cluster.nodes()  # a token that is refused is said before anything else
    modules = plugins.load(list(imports))
    spec = load(path, values)
    modules = plugins.homes(components(spec), modules)
    package = pack(Path(path), spec, modules)
    parts = [spec.digest, str(spec.storage), package.sha256]
    identity = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    submissions = cluster.submissions(spec.name)
    last = next((one for one in submissions if one.identity == identity), None)
    action = _action(last, fresh)
    command = entrypoint(package, overrides, imports, fresh)
    notes: list[str] = []
    seal = ""
    if action in ("start", "resume"):
        notes, seal = check_here(path, values, imports, package)
        notes += _missing(spec, nodes)
    if why := _stays(environment_uri()):
        is_sent = action in ("start", "resume")
        if is_sent and is_uri(spec.storage) and not holds_secret(environment_uri()):
            raise UsageError(
                f"storage: MLflow's database cannot be in an object store, and MLFLOW_TRACKING_URI "
                f"{why}: give the address of a server that the cluster reaches"
            )
        notes.append(f"MLFLOW_TRACKING_URI {why}: it stays here, the cluster has its own")
    if last and action in ("attach", "tell") and last.command != command:
        notes.append(f"that was submitted as `{last.command}`, which holds")
    rivals = [one for one in submissions if one.identity != identity and not one.is_over]
    return Plan(
        cluster, spec, Path(path), package, command,
        identity, action, last, rivals, nodes, notes, seal,
    )  # fmt: skip


def check_here(
    path: str, values: Mapping[str, Any], imports: Sequence[str], package: Package
) -> tuple[list[str], str]:
    """What a check of the job says, as far as its rows are here; and its seal."""
    notes = []
    if package.left_out:
        names = ", ".join(f"{key} {name}" for key, name in package.left_out.items())
        notes.append(f"read there, and not sent: {names}")
    try:
        _, job, found = check(path, values, imports, is_sent=True)
    except (DataError, UsageError) as error:
        if not package.left_out:
            raise
        return [*notes, f"only the spec is checked here: {error}"], ""
    return [*notes, *map(str, found)], seal_of(job)


def _stays(uri: str) -> str:
    """Why an address of MLflow is not one for the cluster; empty for one that is."""
    if holds_secret(uri):
        return "holds a password"
    host = urlsplit(uri).hostname
    if uri and (not host or host in ("localhost", "127.0.0.1", "::1")):
        return "is of this machine alone"
    return ""


def _missing(spec: JobSpec, nodes: list[Node]) -> list[str]:
    """What the workers would wait for."""
    workers = spec.workers
    if room(workers, nodes) < workers.least:
        short = shortage(workers, nodes)
        return [f"the cluster is too small, and refuses it unless it grows by itself: {short}"]
    if room(workers, nodes, is_now=True) < workers.least:
        return [f"it waits for {shortage(workers, nodes, is_now=True)}"]
    return []


def _action(last: Submission | None, fresh: bool) -> Action:
    if last is not None and not last.is_over:
        if fresh:
            raise UsageError(f"{last.id} runs: `pipeline stop {last.job}` before --fresh")
        return "attach"
    if last is None or fresh:
        return "start"
    return "tell" if last.status == "SUCCEEDED" else "resume"
