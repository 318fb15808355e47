"""A namespace of a Kubernetes cluster: its platform, and the runs in it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from pipeline.errors import UsageError
from pipeline.kubernetes.platform import NAME, NAMESPACE, Platform, parse
from pipeline.redact import redact

Document = dict[str, Any]

MANAGER = "pipeline"
"""Owns the fields of what is applied, whoever applied the same manifests before."""
NEEDED = "the Kubernetes client is missing: pip install 'pipeline[k8s]'"
CONNECT_SECONDS, READ_SECONDS = 10.0, 30.0
SILENT_SECONDS = 10.0
"""Without a word in a log, after which the run's state is looked at."""
PATHS = {
    "ConfigMap": "/api/v1/namespaces/{}/configmaps",
    "RayJob": "/apis/ray.io/v1/namespaces/{}/rayjobs",
}
OVER = ("Complete", "Failed", "ValidationFailed")
"""States that a RayJob keeps."""
FRACTION = re.compile(r"\.(\d+)")
"""Of a second."""
EXIT_CODE = re.compile(r"exit code (-?\d+)")


@dataclass(frozen=True)
class RunState:
    """A RayJob, as the cluster knows it."""

    name: str
    job: str
    """The job's name."""
    identity: str
    """What tells the job's spec, data and code from others."""
    state: str
    """Of the deployment: Initializing, Running, Complete, Failed, Suspended, Retrying, ..."""
    status: str
    """Of the command: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED; empty before."""
    reason: str
    message: str
    failures: int
    """Attempts that failed."""
    command: str
    started: float
    """Seconds since 1970; 0 before."""
    ended: float | None
    cluster: str
    """Name of its Ray cluster; empty before there is one."""
    uid: str
    job_id: str
    """Of the command in that cluster; empty before it is submitted."""
    is_leaving: bool
    """Whether it is being deleted."""

    @property
    def is_over(self) -> bool:
        """Whether nothing becomes of it any more."""
        return self.state in OVER

    @property
    def succeeded(self) -> bool:
        """Whether the command ended well."""
        return self.state == "Complete" and self.status == "SUCCEEDED"

    @property
    def exit_code(self) -> int:
        """That of `run`: what the command ended with, or what the cluster's end means."""
        if self.succeeded:
            return 0
        if self.status == "STOPPED":
            return 128 + signal.SIGTERM
        if self.state == "ValidationFailed":
            return 2
        found = EXIT_CODE.search(self.message)
        code = int(found[1]) if found else 1
        return code if code > 0 else 128 - code  # ended by a signal

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        return asdict(self)


class Kubernetes:
    """A namespace. Raises UsageError where the cluster does not answer, or refuses us."""

    def __init__(self, namespace: str = NAMESPACE) -> None:
        try:
            from kubernetes import client, config
        except ImportError:
            raise UsageError(NEEDED) from None
        try:
            if "KUBERNETES_SERVICE_HOST" in os.environ and "KUBECONFIG" not in os.environ:
                config.load_incluster_config()
            else:
                config.load_kube_config()
        except Exception as error:  # the client has an error of its own for each way
            raise UsageError(f"no cluster: {_line(error)}; set KUBECONFIG") from None
        self.namespace = namespace
        self._api = client.ApiClient()
        self.address = str(self._api.configuration.host)

    def platform(self) -> Platform:
        """The cluster's settings."""
        whose = f"ConfigMap {NAME} in {self.namespace}"
        found = self.get(f"{PATHS['ConfigMap'].format(self.namespace)}/{NAME}")
        if found is None:
            raise UsageError(f"{whose}: it is not there; apply an overlay first (k8s/README.md)")
        return parse(found.get("data") or {}, self.namespace, whose)

    def run(self, name: str) -> RunState | None:
        """A RayJob of ours, if it is there."""
        found = self.get(f"{PATHS['RayJob'].format(self.namespace)}/{name}")
        return None if found is None else _state(found)

    def runs(self, job: str | None = None) -> list[RunState]:
        """RayJobs of ours, the newest first: of all jobs, or those of this name, or called so."""
        path = PATHS["RayJob"].format(self.namespace)
        query = [("labelSelector", "app.kubernetes.io/part-of=pipeline")]
        listed = self._read(self._ask("GET", path, query)).get("items", [])
        found = [_state(one) for one in listed]
        found = [one for one in found if job is None or job in (one.job, one.name)]
        return sorted(found, key=lambda one: -one.started)

    def apply(self, documents: list[Document]) -> None:
        """Apply a run's documents; its files go with the RayJob when that is deleted."""
        uid = ""
        for document in documents:
            made = self._apply(document)
            if document["kind"] == "RayJob":
                uid = made["metadata"]["uid"]
        name = next(one["metadata"]["name"] for one in documents if one["kind"] == "RayJob")
        owner = {"apiVersion": "ray.io/v1", "kind": "RayJob", "name": name, "uid": uid}
        for document in documents:
            if document["kind"] == "ConfigMap":
                metadata = {**document["metadata"], "ownerReferences": [owner]}
                self._apply({**document, "metadata": metadata})

    def check(self, documents: list[Document]) -> None:
        """Let the API server say what it would refuse of documents; nothing is kept."""
        for document in documents:
            self._apply(document, is_dry=True)

    def delete(self, name: str, uid: str) -> None:
        """Delete that very RayJob and all that belongs to it, pods with their grace."""
        path = f"{PATHS['RayJob'].format(self.namespace)}/{name}"
        body = {"propagationPolicy": "Foreground", "preconditions": {"uid": uid}}
        with contextlib.suppress(_NotFoundError):
            self._ask("DELETE", path, body=body)

    def submitter(self, name: str) -> str | None:
        """The newest pod that submits a RayJob's command, and prints its log."""
        pods = self._pods(f"batch.kubernetes.io/job-name={name}")
        started = [one for one in pods if one["status"].get("phase") != "Pending"]
        newest = sorted(started, key=lambda one: str(one["metadata"]["creationTimestamp"]))
        return str(newest[-1]["metadata"]["name"]) if newest else None

    def waits_for(self, state: RunState) -> str:
        """Why pods of a RayJob do not run yet, in the cluster's words; empty if it does not say."""
        if not state.cluster:
            return ""
        for pod in self._pods(f"ray.io/cluster={state.cluster}"):
            if why := _pending(pod.get("status") or {}):
                return f"{pod['metadata']['name']}: {why}"
        path = f"/apis/ray.io/v1/namespaces/{self.namespace}/rayclusters/{state.cluster}"
        conditions = ((self.get(path) or {}).get("status") or {}).get("conditions") or []
        failed = [one for one in conditions if one.get("type") == "ReplicaFailure"]
        return str(failed[0].get("message", "")) if failed else ""  # a quota, Pod Security

    def log(self, pod: str, follows: bool = False, after: str = "") -> Iterator[tuple[str, str]]:
        """Lines that a pod has printed after a time, each with its own.

        With `follows` until it ends, or nothing comes: whoever follows asks again.
        """
        import urllib3

        path = f"/api/v1/namespaces/{self.namespace}/pods/{pod}/log"
        query = [("timestamps", "true")]
        query += [("follow", "true")] if follows else []
        since = _moment(after) if after else None
        if since:  # of which the server looks at the seconds
            query.append(("sinceTime", f"{since[0]:%Y-%m-%dT%H:%M:%SZ}"))
        answer = self._ask("GET", path, query, seconds=SILENT_SECONDS if follows else READ_SECONDS)
        rest = b""
        try:
            for piece in answer.stream(2**16):
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    moment, _, text = line.decode(errors="replace").partition(" ")
                    try:
                        is_new = _moment(moment) > since if since else bool(_moment(moment))
                    except ValueError:  # a word of the server's own
                        continue
                    if is_new:
                        yield moment, text
        except (urllib3.exceptions.HTTPError, OSError):
            return
        finally:
            answer.close()

    def get(self, path: str) -> Document | None:
        """An object by its path in the API; None where there is none."""
        try:
            return self._read(self._ask("GET", path))
        except _NotFoundError:
            return None

    def may(self, verb: str, group: str, resource: str, subresource: str = "") -> bool:
        """Whether we may do that to resources of the namespace."""
        wanted = {"namespace": self.namespace, "verb": verb, "group": group, "resource": resource}
        if subresource:
            wanted["subresource"] = subresource
        path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": wanted},
        }
        reviewed = self._read(self._ask("POST", path, body=review))
        return bool(reviewed.get("status", {}).get("allowed"))

    def _pods(self, selector: str) -> list[Document]:
        path = f"/api/v1/namespaces/{self.namespace}/pods"
        answer = self._ask("GET", path, [("labelSelector", selector)])
        return list(self._read(answer).get("items", []))

    def _apply(self, document: Document, is_dry: bool = False) -> Document:
        name = document["metadata"]["name"]
        query = [("fieldManager", MANAGER), ("force", "true"), ("fieldValidation", "Strict")]
        if is_dry:
            query.append(("dryRun", "All"))
        path = f"{PATHS[document['kind']].format(self.namespace)}/{name}"
        kind = "application/apply-patch+yaml"
        return self._read(self._ask("PATCH", path, query, document, kind))

    def _read(self, answer: Any) -> Document:
        """The object that an answer holds. Raises UsageError where it breaks off."""
        import urllib3

        try:
            document: Document = json.loads(answer.data)
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            raise UsageError(f"{self.address}: its answer broke off: {_line(error)}") from None
        return document

    def _ask(
        self,
        method: str,
        path: str,
        query: list[tuple[str, str]] | None = None,
        body: Document | None = None,
        kind: str = "application/json",
        seconds: float = READ_SECONDS,
    ) -> Any:
        """urllib3's answer to a request. Raises UsageError for a refusal, in a line."""
        import urllib3

        headers = {"Content-Type": kind, "Accept": "application/json"}
        method, url, headers, *_ = self._api.param_serialize(
            method, path, query_params=query or [], header_params=headers,
            auth_settings=["BearerToken"],
        )  # fmt: skip
        sent = body if kind == "application/json" or body is None else json.dumps(body)
        try:
            answer = self._api.call_api(
                method, url, headers, sent, _request_timeout=(CONNECT_SECONDS, seconds)
            ).response
            if answer.status >= 400:
                raise self._refusal(answer.status, _message(answer.data) or str(answer.reason))
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise UsageError(f"{self.address}: {_line(error)}") from None
        return answer

    def _refusal(self, status: int, message: str) -> UsageError:
        if status == 404:
            return _NotFoundError(f"{self.address}: {redact(message)}")
        if status == 401:
            message = f"it does not know us ({message}); see `kubectl auth whoami`"
        elif status == 409:
            message = f"another has changed it at the same time ({message}); the same command again"
        return UsageError(f"{self.address}: {redact(message)}")


class _NotFoundError(UsageError):
    """There is no such object, or no such kind."""


def _state(document: Mapping[str, Any]) -> RunState:
    metadata, status = document["metadata"], document.get("status") or {}
    notes = metadata.get("annotations") or {}
    return RunState(
        name=metadata["name"],
        job=notes.get("pipeline/job", metadata["name"]),
        identity=notes.get("pipeline/identity", ""),
        state=status.get("jobDeploymentStatus") or "New",
        status=status.get("jobStatus") or "",
        reason=status.get("reason") or "",
        message=status.get("message") or "",
        failures=int(status.get("failed") or 0),
        command=document.get("spec", {}).get("entrypoint", "").replace("$$", "$"),
        started=_time(status.get("startTime") or metadata.get("creationTimestamp")) or 0.0,
        ended=_time(status.get("endTime")),
        cluster=status.get("rayClusterName") or "",
        uid=metadata.get("uid", ""),
        job_id=status.get("jobId") or "",
        is_leaving="deletionTimestamp" in metadata,
    )


def _pending(status: Mapping[str, Any]) -> str:
    """Why a pod does not run yet."""
    for one in status.get("conditions") or []:
        if one.get("reason") == "Unschedulable":
            return str(one.get("message", ""))
    started = [
        *(status.get("initContainerStatuses") or []),
        *(status.get("containerStatuses") or []),
    ]
    for one in started:
        waiting = one.get("state", {}).get("waiting") or {}
        if waiting.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
            return f"{waiting['reason']} {waiting.get('message', '')}".strip()
    return ""


def _time(text: str | None) -> float | None:
    return datetime.fromisoformat(text).timestamp() if text else None


def _moment(text: str) -> tuple[datetime, str]:
    """A log's time in whatever zone, to the nanosecond. Raises ValueError for what is none."""
    fraction = FRACTION.search(text)
    second = datetime.fromisoformat(text).replace(microsecond=0)
    return second.astimezone(UTC), (fraction[1] if fraction else "").ljust(9, "0")


def _message(body: Any) -> str:
    """The message of an API server's refusal."""
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        return str(json.loads(body).get("message", ""))
    return ""


def _line(error: BaseException) -> str:
    text = str(error) or repr(error)
    for known in ("Connection refused", "Name or service not known", "timed out"):
        if known in text:
            return known.lower()
    return redact(" ".join(text.split())[:200])
