"""A Ray cluster behind the address of its dashboard: its nodes, and the jobs submitted to it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.errors import RunError, UsageError
from pipeline.launch.resources import Node
from pipeline.redact import redact

DEFAULT_PORT = 8265
REACH_SECONDS = 10.0
REQUEST_SECONDS = 60.0
NOT_READY = "No available agent"
"""In the refusal of a head that has just been started."""
AGENT_SECONDS = 60.0
SILENT_SECONDS = 10.0
"""Without a word in a log, after which the job's status is looked at."""
TOKENS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
OURS = "pipeline."
"""Begins the keys of what is said of a job to Ray."""
LOGGERS = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class Submission:
    """A job that was submitted, as the cluster knows it."""

    id: str
    job: str
    """The job's name."""
    identity: str
    """What tells the job's spec, data and code from others."""
    attempt: int
    command: str
    """What it runs on the cluster."""
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    message: str
    exit_code: int | None
    """Of the command, where it ended by itself."""
    started: float
    """Seconds since 1970."""
    ended: float | None

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        return asdict(self)

    @property
    def is_over(self) -> bool:
        """Whether nothing becomes of it any more."""
        return self.status in ENDED


class Cluster:
    """A cluster's dashboard. Raises UsageError for one that does not answer, or refuses us."""

    def __init__(self, address: str) -> None:
        self.address = _with_scheme(address)
        if "RAY_AUTH_MODE" not in os.environ and _has_token():
            os.environ["RAY_AUTH_MODE"] = "token"  # without it, Ray's client sends none
        with self._explained(), _no_other_address():
            self._client = _client(self.address)
            self.version = str(self._get("/api/version")["ray_version"])

    def nodes(self) -> list[Node]:
        """The living nodes, with what is free on each: nothing where the cluster does not say."""
        from ray.dashboard.utils import to_camel_case

        with self._explained():
            listed = self._get("/api/v0/nodes?detail=1&limit=10000")["data"]["result"]["result"]
            status = self._get("/api/cluster_status")["data"]["clusterStatus"] or {}
        load = status.get("loadMetricsReport") or {}
        usage = {key.lower(): value for key, value in (load.get("usageByNode") or {}).items()}
        nodes = []
        for one in listed:
            if one["state"] != "ALIVE":
                continue
            total = one["resources_total"]
            used = usage.get(one["node_id"].lower(), {})
            free = {k: n - used.get(to_camel_case(k), (0.0,))[0] for k, n in total.items()}
            nodes.append(Node(one["node_ip"], total, free, one.get("labels") or {}))
        return nodes

    def submissions(self, job: str | None = None) -> list[Submission]:
        """What was submitted of a job, or of all, the newest first."""
        with self._explained():
            listed = self._client.list_jobs()
        found = [one for each in listed if (one := _submission(each))]
        found = [one for one in found if job is None or job in (one.job, one.id)]
        return sorted(found, key=lambda one: -one.started)

    def submission(self, submission_id: str) -> Submission:
        """A submitted job, by its id. Raises RunError if the cluster knows it no more."""
        with self._explained():
            try:
                found = _submission(self._client.get_job_info(submission_id))
            except RuntimeError as error:
                if f"{submission_id} does not exist" not in str(error):
                    raise
                raise RunError(
                    f"the cluster does not know {submission_id} any more, as when its head was "
                    "started anew; the same `pipeline submit` resumes the run"
                ) from None
        if found is None:
            raise UsageError(f"{submission_id} was not submitted by `pipeline submit`")
        return found

    def submit(
        self,
        submission_id: str,
        entrypoint: str,
        package: Path,
        variables: Mapping[str, str],
        metadata: Mapping[str, str],
    ) -> bool:
        """Submit a folder and a command to run in it; False where the id is taken already."""
        environment = {"working_dir": str(package), "env_vars": dict(variables)}
        said = {f"{OURS}{key}": value for key, value in metadata.items()}
        deadline = time.monotonic() + AGENT_SECONDS
        while True:
            with self._explained():
                try:
                    self._client.submit_job(
                        entrypoint=entrypoint,
                        submission_id=submission_id,
                        runtime_env=environment,
                        metadata=said,
                    )
                    return True
                except RuntimeError as error:
                    if "already exists" in str(error):
                        return False
                    if NOT_READY not in str(error) or time.monotonic() > deadline:
                        raise
            time.sleep(1)

    def stop(self, submission_id: str) -> None:
        """Ask a job to end: it gets a SIGTERM, and later a SIGKILL."""
        with self._explained():
            self._client.stop_job(submission_id)

    def logs(self, submission_id: str) -> str:
        """All that a job has printed so far."""
        with self._explained():
            return str(self._client.get_job_logs(submission_id))

    async def follow(self, submission_id: str, start: int = 0) -> AsyncIterator[str | None]:
        """What a job prints after so many characters, piece by piece, until it has ended.

        None while nothing comes and the cluster answers. The stream may break, or end on a healthy
        job: its status tells whether it is over. Raises UsageError where that is not told, and
        RunError where the cluster knows of no such job.
        """
        while True:
            num_here = 0
            with contextlib.suppress(Exception):  # whatever broke: the status says what is
                async for text in _until_silent(self._client.tail_job_logs(submission_id)):
                    if text is None:
                        if await self._is_over(submission_id):
                            break
                        yield None
                        continue
                    new = text[max(0, start - num_here) :]
                    num_here += len(text)
                    start = max(start, num_here)
                    if new:
                        yield new
            if await self._is_over(submission_id):
                yield self._rest(submission_id, start)
                return
            yield None
            await asyncio.sleep(1)

    async def _is_over(self, submission_id: str) -> bool:
        """Asked in a thread, so that Ctrl-C is heard meanwhile."""
        return (await asyncio.to_thread(self.submission, submission_id)).is_over

    def _rest(self, submission_id: str, start: int) -> str:
        """The end of a log; where it cannot be read, as with bytes that are no text, that."""
        try:
            return self.logs(submission_id)[start:]
        except UsageError as error:
            return f"note  the log cannot be read to its end: {error}\n"

    def _get(self, path: str) -> Any:
        answer = self._client._do_request("GET", path)
        answer.raise_for_status()
        return answer.json()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """UsageError for what the cluster refuses, in a line."""
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError:
            has = "refuses the token" if _has_token() else "wants a token"
            raise UsageError(
                f"{self.address}: the cluster {has}: set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to "
                "a file that holds it"
            ) from None
        except (requests.exceptions.RequestException, ConnectionError, TimeoutError) as error:
            raise UsageError(f"{self.address}: {_reason(error)}") from None
        except (RuntimeError, ValueError, KeyError, TypeError) as error:  # as Ray words a refusal
            lines = [line for line in str(error).splitlines() if re.search(r"\w", line)]
            raise UsageError(f"{self.address}: {redact((lines or [repr(error)])[-1])}") from None


async def _until_silent(stream: AsyncIterator[str]) -> AsyncIterator[str | None]:
    """The pieces of a stream, and None whenever none has come for a while."""
    pieces = aiter(stream)
    while True:
        piece = asyncio.ensure_future(anext(pieces))
        try:
            while not (await asyncio.wait({piece}, timeout=SILENT_SECONDS))[0]:
                yield None
            yield piece.result()
        except StopAsyncIteration:
            return
        finally:
            piece.cancel()


def _client(address: str) -> Any:
    """Ray's client, of which no request waits for ever."""
    from ray.job_submission import JobSubmissionClient

    for name in LOGGERS:  # which tell each step
        logging.getLogger(name).setLevel(logging.WARNING)

    class Client(JobSubmissionClient):  # type: ignore[misc]
        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            seconds = REACH_SECONDS if endpoint == "/api/version" else REQUEST_SECONDS
            return super()._do_request(method, endpoint, timeout=seconds, **options)

    trusted = os.environ.get("SSL_CERT_FILE") or os.environ.get("REQUESTS_CA_BUNDLE")
    return Client(address, verify=trusted or True)


@contextlib.contextmanager
def _no_other_address() -> Iterator[None]:
    """Ray takes an address in the environment for that of the dashboard, before ours."""
    keys = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
    before = {key: os.environ.pop(key) for key in keys if key in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def _with_scheme(address: str) -> str:
    """The dashboard's address as a URL, without a path. Raises UsageError if it is none."""
    wanted = f"expected the dashboard's, as http://HEAD:{DEFAULT_PORT}"
    try:
        url = urlsplit(address if "://" in address else f"http://{address}")
        host, port = url.hostname, url.port
    except ValueError:
        raise UsageError(f"--address {redact(address)}: {wanted}") from None
    if url.scheme not in ("http", "https") or not host or url.path.strip("/") or url.query:
        raise UsageError(f"--address {redact(address)}: {wanted}")
    if url.username or url.password:
        raise UsageError("--address: no password goes there; RAY_AUTH_TOKEN holds a token")
    has_port = port is not None or url.scheme == "https"
    return f"{url.scheme}://{url.netloc}" + ("" if has_port else f":{DEFAULT_PORT}")


def _has_token() -> bool:
    """Whether there is a token where Ray looks for one."""
    return any(key in os.environ for key in TOKENS) or (Path.home() / ".ray/auth_token").exists()


def _submission(details: Any) -> Submission | None:
    """A job of ours; None for others."""
    metadata = details.metadata or {}
    said = {k.removeprefix(OURS): v for k, v in metadata.items() if k.startswith(OURS)}
    if details.submission_id is None or "job" not in said:
        return None
    return Submission(
        details.submission_id,
        said["job"],
        said.get("identity", ""),
        int(attempt) if (attempt := said.get("attempt", "1")).isdigit() else 1,
        said.get("command", ""),
        str(getattr(details.status, "value", details.status)),
        details.message or "",
        details.driver_exit_code,
        (details.start_time or 0) / 1000,
        details.end_time / 1000 if details.end_time else None,
    )


def _reason(error: Exception) -> str:
    """Why a request came to nothing, in a few words; Ray's own words hide the cause."""
    text = str(error)
    with_cause = f"{text} {error.__context__}"
    if found := re.search(r"certificate verify failed: ([^(]*)", with_cause):
        why, unknown = found[1].strip(), ("self-signed", "self signed", "unable to get")
        fix = ": set SSL_CERT_FILE to the one that signed it" if why.startswith(unknown) else ""
        return f"its certificate is not trusted ({why}){fix}"
    if "Name or service not known" in with_cause or "Failed to resolve" in with_cause:
        return "no such host"
    if "timed out" in with_cause:
        return "no answer"
    if "Connection refused" in with_cause or "Failed to connect" in text:
        return "no cluster answers there"
    if "Connection aborted" in text or "Connection reset" in with_cause:
        return "the connection broke"
    return redact(text.splitlines()[0] if text else repr(error))
