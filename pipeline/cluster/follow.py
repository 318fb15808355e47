"""A submitted job as it is followed from here: its lines as they come, and how it ended."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pipeline.cluster.client import Cluster, Submission
from pipeline.errors import RunError, UsageError

NOISE = re.compile(r"^(Running entrypoint for job |\d{4}-\d\d-\d\d \S+\s+INFO job_manager\.py)")
"""Lines of Ray's own in a job's log."""
PASSING = re.compile(r"^(epoch \d+/|step \d+ of |starting |waiting for |rows  )")
"""Lines of progress, of which each replaces the last where somebody watches."""
LAST = re.compile(r"^(error: |stopped by |done  )")
"""Lines that say what became of a job."""
GONE_SECONDS = 300.0
"""How long a cluster may be out of reach while a job is followed."""
NO_PIPELINE = re.compile(r"No module named '?pipeline'?$")


@dataclass
class Lines:
    """A log's lines, put together from its pieces."""

    show: Callable[[str, bool], None]
    """Takes a line, and whether the next one may replace it."""
    hides_result: bool = False
    """Whether the JSON object of `run --json` is kept back."""
    result: dict[str, Any] | None = None
    """That object, once it has come."""
    num_chars: int = 0
    """How much of the log has been added."""
    last: list[str] = field(default_factory=list)
    """Its last lines, for a job that ended without a word."""
    _rest: str = ""

    def add(self, piece: str) -> None:
        """Take in the next piece."""
        self.num_chars += len(piece)
        *lines, self._rest = (self._rest + piece).split("\n")
        for line in lines:
            self._take(line.rstrip("\r"))

    def end(self) -> None:
        """There is no more."""
        if self._rest:
            self._take(self._rest)
        self._rest = ""

    def _take(self, line: str) -> None:
        if NOISE.match(line):
            return
        if found := _result(line):
            self.result = found
            if self.hides_result:
                return
        self.last = [*self.last[-20:], line]
        self.show(line, bool(PASSING.match(line)))


def _result(line: str) -> dict[str, Any] | None:
    """What `run --json` ends with, if the line is that."""
    if not line.startswith('{"') or '"state": ' not in line:
        return None
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found.get("state"), str) else None


def follow(cluster: Cluster, submission_id: str, lines: Lines) -> Submission:
    """Show what a job prints until it has ended.

    Raises KeyboardInterrupt for Ctrl-C, and RunError when the cluster is gone, or has lost the job.
    """

    async def run() -> Submission:
        lost = 0.0
        while True:
            try:
                async for piece in cluster.follow(submission_id, lines.num_chars):
                    lost = 0.0
                    if piece:
                        lines.add(piece)
                return cluster.submission(submission_id)
            except UsageError as error:  # it is out of reach: the job may go on all the same
                if not lost:
                    lost = time.monotonic()
                    lines.show(f"note  {error}; asking again for {GONE_SECONDS:.0f} s", False)
                if time.monotonic() - lost > GONE_SECONDS:
                    raise RunError(
                        f"{error}; the same `pipeline submit` attaches to the job, or resumes it"
                    ) from None
                await asyncio.sleep(2)

    with interruptible():
        ended = asyncio.run(run())
    lines.end()
    return ended


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, where this command has an answer of its own."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def last_words(log: str, is_over: bool) -> str:
    """What a job's log says last of what became of it, or it is at; empty if it says nothing."""
    telling = (LAST,) if is_over else (LAST, PASSING)
    lines = reversed(log.splitlines())
    return next((line for line in lines if any(kind.match(line) for kind in telling)), "")


def exit_code(submission: Submission) -> int:
    """That of the command on the cluster, or of what ended it."""
    if submission.status == "SUCCEEDED":
        return 0
    if submission.status == "STOPPED":
        return 128 + signal.SIGTERM
    code = submission.exit_code or 1
    return code if code > 0 else 128 - code  # ended by a signal


def explain(submission: Submission, lines: Lines) -> str:
    """Why a job failed that has not said so itself; or nothing."""
    if submission.status != "FAILED":
        return ""
    if any(NO_PIPELINE.search(line) for line in lines.last):
        return (
            "the cluster's `python` has no `pipeline` package: install it in the nodes' image, or "
            "put the environment that has it first on the PATH of `ray start`; here it is Python "
            f"{sys.version_info.major}.{sys.version_info.minor}"
        )
    if submission.exit_code is None:
        return submission.message.strip().partition("\n")[0]
    return ""
