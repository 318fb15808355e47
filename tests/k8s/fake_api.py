"""A Kubernetes API server over HTTP, as far as the submit client asks it; the operator is the test.

It keeps objects, applies on the server's side (with its conflicts and strict fields), checks
RayJobs against KubeRay's schema, answers 401, 403, 404, 409 and 422 as the real one words them,
deletes with a grace, and streams logs that break or end while their pod goes on.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from pipeline.kubernetes.rules import Document

from . import schemas

TOKEN = "of-the-user"


@dataclass
class FakeApi:
    """The objects by their path; what is refused; what pods have printed."""

    crds: schemas.Crds
    rules: list[Document]
    """What the user may do in the namespace, as of a Role."""
    objects: dict[str, Document] = field(default_factory=dict)
    logs: dict[str, list[str]] = field(default_factory=dict)
    """Lines by pod, two in a minute of its clock: a stream ends though its pod goes on."""
    forbidden: set[tuple[str, str]] = field(default_factory=set)
    """Methods and resources."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    delete_seconds: float = 0.0
    is_down: bool = False
    port: int = 0
    lock: threading.RLock = field(default_factory=threading.RLock)

    def put(self, path: str, document: Document) -> Document:
        """Store an object, as if it had been there."""
        metadata = document.setdefault("metadata", {})
        metadata.setdefault("name", path.rpartition("/")[2])
        metadata.setdefault("uid", str(uuid.uuid4()))
        metadata.setdefault("creationTimestamp", _now())
        with self.lock:
            self.objects[path] = document
        return document

    def run(self, name: str) -> Document:
        return self.objects[f"/apis/ray.io/v1/namespaces/pipeline/rayjobs/{name}"]

    def set(self, name: str, **status: Any) -> None:
        """What the operator says of a RayJob."""
        with self.lock:
            self.run(name).setdefault("status", {}).update(status)

    def submitter(self, name: str, attempt: int, *pieces: str) -> str:
        """A pod that submits a RayJob's command, and what it prints."""
        pod = f"{name}-{attempt}"
        labels = {"batch.kubernetes.io/job-name": name}
        moment = f"2026-01-01T00:00:{attempt:02}Z"
        metadata = {"labels": labels, "creationTimestamp": moment}
        document = {"kind": "Pod", "metadata": metadata, "status": {"phase": "Running"}}
        self.put(f"/api/v1/namespaces/pipeline/pods/{pod}", document)
        self.logs[pod] = list(pieces)
        return pod

    def kubeconfig(self, folder: Path, token: str = TOKEN) -> Path:
        """A file with this server as the current context."""
        path = folder / "kubeconfig"
        cluster = {"server": f"http://127.0.0.1:{self.port}"}
        document = {
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": cluster}],
            "users": [{"name": "u", "user": {"token": token}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        }  # fmt: skip
        path.write_text(yaml.safe_dump(document))
        return path


@contextmanager
def serving(crds: schemas.Crds, rules: list[Document]) -> Iterator[FakeApi]:
    api = FakeApi(crds, rules)

    class Handler(_Handler):
        fake = api

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    api.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield api
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    fake: FakeApi

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path, query = self._asked()
        if path is None:
            return
        found = self.fake.objects.get(path)
        if path.endswith("/log"):
            self._stream(path.split("/")[-2], "follow" in query, query.get("sinceTime", [""])[0])
        elif found is not None:
            self._answer(200, found)
        elif path.rpartition("/")[2] in ("rayjobs", "pods", "nodes", "deployments"):
            self._answer(200, {"kind": "List", "items": self._listed(path, query)})
        else:
            self._refuse(404, f'{_resource(path)} "{path.rpartition("/")[2]}" not found')

    def do_PATCH(self) -> None:
        path, query = self._asked()
        if path is None:
            return
        if self.headers["Content-Type"] != "application/apply-patch+yaml":
            self._refuse(415, "the body of the request was in an unknown format")
            return
        manager = query.get("fieldManager", [""])[0]
        wanted = yaml.safe_load(self._body())
        if not manager:
            self._refuse(400, "fieldManager is required for apply patch")
            return
        if "fieldValidation" in query and (wrong := self._unknown(wanted)):
            self._refuse(400, wrong)
            return
        before = self.fake.objects.get(path)
        other = (before or {}).get("metadata", {}).get("managed", manager)
        if other != manager and query.get("force") != ["true"]:
            self._refuse(409, f'Apply failed with 1 conflict: conflict with "{other}": .spec')
            return
        made = {**(before or {}), **wanted}
        kept = (before or {}).get("metadata", {})
        made["metadata"] = {**kept, **wanted["metadata"], "managed": manager}
        if "dryRun" in query:
            made["metadata"].setdefault("uid", "none")
        else:
            self.fake.put(path, made)
        self._answer(200 if before else 201, made)

    def do_DELETE(self) -> None:
        path, _ = self._asked()
        if path is None:
            return
        wanted = json.loads(self._body()).get("preconditions", {}).get("uid")
        with self.fake.lock:
            found = self.fake.objects.get(path)
            if found and wanted and found["metadata"]["uid"] != wanted:
                self._refuse(409, "Precondition failed: UID in precondition")
                return
            if found is None:
                self._refuse(404, f'{_resource(path)} "{path.rpartition("/")[2]}" not found')
                return
            found["metadata"]["deletionTimestamp"] = _now()
        timer = threading.Timer(self.fake.delete_seconds, self._gone, [path])
        timer.daemon = True
        timer.start()
        self._answer(200, found)

    def do_POST(self) -> None:
        path, _ = self._asked()
        if path is None:
            return
        body = json.loads(self._body())
        wanted = body["spec"]["resourceAttributes"]
        method = {"create": "PATCH", "patch": "PATCH", "delete": "DELETE"}.get(
            wanted["verb"], "GET"
        )
        is_allowed = (method, wanted["resource"]) not in self.fake.forbidden
        self._answer(201, {**body, "status": {"allowed": is_allowed}})

    def _gone(self, path: str) -> None:
        with self.fake.lock:
            gone = self.fake.objects.pop(path, None)
            uid = gone["metadata"]["uid"] if gone else ""
            owned = [
                place
                for place, one in self.fake.objects.items()
                if any(o["uid"] == uid for o in one["metadata"].get("ownerReferences", []))
            ]
            for place in owned:
                del self.fake.objects[place]

    def _asked(self) -> tuple[str | None, dict[str, list[str]]]:
        """The path and query of a request that is not refused."""
        url = urlsplit(self.path)
        self.fake.requests.append((self.command, url.path))
        if self.fake.is_down:
            self.close_connection = True
            return None, {}
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._refuse(401, "Unauthorized")
            return None, {}
        is_forbidden = (self.command, _resource(url.path)) in self.fake.forbidden
        if is_forbidden or not self._may(url.path):
            said = f'{_resource(url.path)} is forbidden: User "u" cannot do that in "pipeline"'
            self._refuse(403, said)
            return None, {}
        return url.path, parse_qs(url.query)

    def _may(self, path: str) -> bool:
        """Whether a rule allows the request, if it is one in the namespace."""
        prefix, has_namespace, rest = path.partition("/namespaces/pipeline/")
        if not has_namespace:
            return True
        resource, _, name = rest.partition("/")
        name, _, part = name.partition("/")
        resource = f"{resource}/{part}" if part else resource
        group = prefix.split("/")[2] if prefix.startswith("/apis/") else ""
        verbs = {"GET": ["get" if name else "list"], "PATCH": ["patch", "create"]}
        return all(
            any(
                verb in rule["verbs"]
                and resource in rule["resources"]
                and group in rule["apiGroups"]
                for rule in self.fake.rules
            )
            for verb in verbs.get(self.command, [self.command.lower()])
        )

    def _listed(self, path: str, query: dict[str, list[str]]) -> list[Document]:
        selector = dict(
            part.split("=") for part in query.get("labelSelector", [""])[0].split(",") if part
        )
        with self.fake.lock:
            found = [one for place, one in self.fake.objects.items()
                     if place.rpartition("/")[0] == path]  # fmt: skip
        return [one for one in found
                if selector.items() <= (one["metadata"].get("labels") or {}).items()]  # fmt: skip

    def _unknown(self, document: Document) -> str:
        faults = schemas.ray_schema_faults([document], self.fake.crds)
        faults += [] if schemas.is_rays(document) else schemas.core_schema_faults(
            [document], "1.29")  # fmt: skip
        return f"strict decoding error: {faults[0]}" if faults else ""

    def _stream(self, pod: str, follows: bool, since: str) -> None:
        """Lines with their times, from a second on; a stream that follows ends after another."""
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.end_headers()
        pieces = self.fake.logs.get(pod, [])
        sent = 0
        deadline = time.monotonic() + (1 if follows else 0)
        while True:
            for number, piece in enumerate(pieces[sent:], sent):
                second = f"2026-01-01T00:{number // 2:02}:00"
                # of a node that is two hours ahead
                moment = f"{second.replace('T00', 'T02')}.{number % 2 * 5 + 1}00000000+02:00"
                if second >= since[:19]:
                    self.wfile.write(f"{moment} {piece}".encode())
            sent = max(sent, len(pieces))
            self.wfile.flush()
            if time.monotonic() >= deadline:
                return
            time.sleep(0.05)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int, document: Document) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refuse(self, status: int, message: str) -> None:
        said = {"kind": "Status", "status": "Failure", "code": status, "message": message}
        self._answer(status, said)


def _resource(path: str) -> str:
    parts: Sequence[str] = path.strip("/").split("/")
    known = ("rayjobs", "configmaps", "pods", "secrets", "nodes", "persistentvolumeclaims")
    return next((part for part in parts if part in known), parts[-1])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
