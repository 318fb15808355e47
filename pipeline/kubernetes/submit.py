"""What submitting a run would do, and how one is followed to its end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from pipeline.cluster.follow import Lines, interruptible
from pipeline.errors import RunError, UsageError
from pipeline.kubernetes.client import EXIT_CODE, Document, Kubernetes, RunState
from pipeline.kubernetes.run import Run

Action = Literal["start", "resume", "attach", "tell"]
GONE_SECONDS = 300.0
"""How long a cluster may be out of reach while a run is followed."""
DELETE_SECONDS = 60.0
"""Beyond the pods' grace, for a RayJob to be gone."""
POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Plan:
    """A run, and what there is of it in the cluster."""

    cluster: Kubernetes
    run: Run
    last: RunState | None
    action: Action
    rivals: list[RunState]
    """Others of the job's name that run."""
    notes: list[str]
    """What a person should know before."""


def make_plan(cluster: Kubernetes, run: Run, check: Callable[[], list[str]]) -> Plan:
    """Look at the cluster; nothing is changed. Raises UsageError.

    `check` gives notes on the job, and raises what is wrong in it; it is called for one to be sent.
    """
    last = cluster.run(run.name)
    if last is not None and last.is_leaving:
        last = None  # it is gone when it is submitted
    rivals = [one for one in cluster.runs(run.spec.name) if not one.is_over]
    rivals = [one for one in rivals if one.name != run.name]
    action = _action(last, run.fresh)
    notes = [*run.notes, *check()] if action in ("start", "resume") else []
    if last is not None and action in ("attach", "tell") and last.command != run.command:
        notes.append(f"that was submitted as `{last.command}`, which holds")
    return Plan(cluster, run, last, action, rivals, notes)


def _action(last: RunState | None, fresh: bool) -> Action:
    if last is None:
        return "start"
    if not last.is_over:
        if fresh:
            raise UsageError(f"{last.name} runs: `pipeline k8s stop {last.name}` before --fresh")
        return "attach"
    if fresh:
        return "start"
    return "tell" if last.succeeded else "resume"


def send(plan: Plan, documents: list[Document], seconds: float) -> bool:
    """Apply a run's documents, in place of the RayJob that the plan has seen to be over.

    False where another command has submitted the run since. Raises UsageError.
    """
    plan.cluster.check(documents)  # what is refused is refused before anything is deleted
    now = plan.cluster.run(plan.run.name)
    if now is not None and not now.is_leaving:
        if plan.last is None or now.uid != plan.last.uid or not now.is_over:
            return False
        plan.cluster.delete(now.name, now.uid)
    await_gone(plan.cluster, plan.run.name, now.uid if now else "", seconds)
    plan.cluster.apply(documents)
    return True


def end(cluster: Kubernetes, state: RunState, seconds: float) -> None:
    """Delete a RayJob and wait until its pods have ended. Raises UsageError where they do not."""
    cluster.delete(state.name, state.uid)
    await_gone(cluster, state.name, state.uid, seconds)


def await_gone(cluster: Kubernetes, name: str, uid: str, seconds: float) -> None:
    """Wait for a RayJob that is being deleted, beyond its pods' grace."""
    seconds += DELETE_SECONDS
    deadline = time.monotonic() + seconds
    while (now := cluster.run(name)) is not None and now.uid == uid:
        if time.monotonic() > deadline:
            raise UsageError(f"{name} is not gone within {seconds:.0f} s; ask again")
        time.sleep(POLL_SECONDS)


def follow(cluster: Kubernetes, name: str, lines: Lines, report: Callable[[str], None]) -> RunState:
    """Show what a run prints, in each of its attempts, until it has ended.

    `report` is called with what is waited for. Raises KeyboardInterrupt for Ctrl-C, and RunError
    when the cluster is out of reach for long, or the RayJob is gone.
    """
    with interruptible():
        ended = _followed(_Follower(cluster, name, lines, report))
    lines.end()
    return ended


def _followed(follower: _Follower) -> RunState:
    lost = 0.0
    while True:
        try:
            state = follower.look()
            lost = 0.0
        except UsageError as error:  # it is out of reach: the run may go on all the same
            if not lost:
                lost = time.monotonic()
                follower.report(f"note  {error}; asking again for {GONE_SECONDS:.0f} s")
            if time.monotonic() - lost > GONE_SECONDS:
                raise RunError(f"{error}; the same command attaches to the run") from None
            time.sleep(2)
            continue
        if state.is_over:
            return state
        time.sleep(POLL_SECONDS)


@dataclass
class _Follower:
    """What has been shown of a run so far."""

    cluster: Kubernetes
    name: str
    lines: Lines
    report: Callable[[str], None]
    pod: str | None = None
    seen: str = ""
    """Time of the last line that was shown of the pod's log."""
    job_id: str = ""
    shown: Counter[str] = field(default_factory=Counter)
    """How often each line of that job was shown."""
    again: Counter[str] = field(default_factory=Counter)
    """Of these, those that a submitter that was replaced will print once more: from the start."""
    message: str = ""
    """The last that was reported."""

    def look(self) -> RunState:
        """Show what is new; the state is that of before, so that an end's last words come."""
        state = self.cluster.run(self.name)
        if state is None or state.is_leaving:
            raise RunError(f"{self.name} was deleted; the same command resumes the run")
        pod = self.cluster.submitter(self.name)
        if pod != self.pod:
            self.pod, self.seen = pod, ""
            self.again = self.shown.copy() if state.job_id == self.job_id else Counter()
            if state.job_id != self.job_id:
                self.job_id, self.shown = state.job_id, Counter()
        if pod is None:
            self._wait(state)
            return state
        try:
            self._show(pod, follows=not state.is_over)
        except UsageError as error:  # its state is what counts
            self._report(f"note  its log cannot be read: {error}")
        return state

    def _show(self, pod: str, follows: bool) -> None:
        for moment, line in self.cluster.log(pod, follows, self.seen):
            self.seen = moment
            if self.again[line] > 0:
                self.again[line] -= 1
                continue
            self.shown[line] += 1
            self.lines.add(f"{line}\n")

    def _wait(self, state: RunState) -> None:
        what, first_line = state.state.lower(), state.message.partition("\n")[0]
        what = f"{what}: {first_line}" if first_line else what
        if why := self.cluster.waits_for(state):
            what = f"waiting for {why}"
        self._report(f"run   {self.name} {what}")

    def _report(self, message: str) -> None:
        """Once, until there is another."""
        if message != self.message:
            self.message = message
            self.report(message)


def explain(state: RunState) -> str:
    """Why a run has ended without its own word; empty if it has said it or ended well."""
    if state.succeeded:
        return ""
    if state.status == "STOPPED":
        return "it was stopped; the same command resumes it"
    reasons = {
        "DeadlineExceeded": "its deadline: its state is being saved, and the same command resumes "
        "it",
        "PreRunningDeadlineExceeded": "its pods did not come to run in time: see `pipeline k8s "
        "doctor`, and `kubectl describe pods`",
        "ValidationFailed": f"the operator refuses it: {state.message}",
        "JobStatusCheckTimeoutExceeded": "its head was out of reach for long, as when its node is "
        "lost; the same command resumes it",
        "SubmissionFailed": f"the command could not be submitted: {state.message}",
    }
    key = "ValidationFailed" if state.state == "ValidationFailed" else state.reason
    has_own_words = EXIT_CODE.search(state.message)  # in the log
    message = "" if has_own_words else state.message.partition("\n")[0] or state.reason
    return reasons.get(key, message)
