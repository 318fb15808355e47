"""Which failures of workers are worth another try: their death is, their own error is not."""

from __future__ import annotations

import re
from typing import Any

from ray.train import UserCallback

from pipeline.distributed.comm import is_echo
from pipeline.errors import PipelineError, RunError
from pipeline.launch import out_of_memory
from pipeline.redact import redact
from pipeline.rundir import RunDir
from pipeline.rundir.journal import Reader

FRUITLESS = 3
"""Deaths of workers, one after the other without getting further, that end the run."""
TELLING = r"process has died|is dead because|\bnode\b"
"""In the line of Ray's long texts that says what happened."""


class Restarts(UserCallback):  # type: ignore[misc]
    """Ends the run where another try would fail again; Ray starts the workers anew elsewhere.

    Runs in Ray's controller, which gives up on what a callback raises.
    """

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.fruitless = 0
        self.reached = (0, 0)

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise the workers' own error, or RunError when workers die without getting on."""
        errors = [getattr(e, "_base_exc", None) or e for e in worker_exceptions.values()]
        for error in errors:
            if isinstance(error, PipelineError):
                raise error
        deaths = [error for error in errors if is_death(error)]
        own = [error for error in errors if not (is_echo(error) or is_death(error))]
        if own and not deaths:
            raise own[0]
        self.count((deaths or errors)[0])

    def count(self, error: BaseException) -> None:
        """One more death. Raises RunError when there were too many without getting further."""
        points = list(Reader(self.run.journal).new())
        starts = [p["step"] for p in points if "event" in p and p["event"] == "start"]
        reached = max((p["step"] for p in points), default=0), max(starts, default=0)
        self.fruitless = self.fruitless + 1 if reached <= self.reached else 1
        self.reached = max(reached, self.reached)
        reason = _first_line(error)
        if self.fruitless >= FRUITLESS:
            raise RunError(
                f"workers died {FRUITLESS} times after step {reached[0]} without getting further: "
                f"{reason}. Usual causes: too little memory, a node that keeps failing"
            )
        self.run.failure.write_text(reason)


def is_death(error: object) -> bool:
    """Ray's own word that a worker or its node is gone."""
    return type(error).__module__.startswith("ray.")


def is_untried(error: Exception) -> bool:
    """A worker that died while its group still started: Ray gives up on it by itself."""
    failure = getattr(error, "controller_failure", None)
    return type(failure).__name__ in ("ActorDiedError", "ActorUnavailableError")


def own_error(error: BaseException) -> PipelineError | None:
    """The first failing worker's own error, if it was not its death or that of another one."""
    seen = _innermost(error)
    return None if is_death(seen) or is_echo(seen) else cause_of(seen)


def cause_of(error: BaseException) -> PipelineError:
    """The first failing worker's own error out of Ray's layers around it, or what stands for it."""
    seen = _innermost(error)
    if isinstance(seen, PipelineError):
        return seen
    text = _first_line(seen) if is_death(seen) else str(seen).strip()
    return RunError(f"{type(seen).__name__}: {text}" if text else repr(seen))


def _innermost(error: BaseException) -> BaseException:
    seen = error
    while not isinstance(seen, PipelineError):
        failures = getattr(seen, "worker_failures", None)
        inner: Any = None
        if failures:
            inner = failures[min(failures, key=lambda rank: (is_echo(failures[rank]), rank))]
        attributes = ("_base_exc", "controller_failure", "__cause__", "cause")
        inner = inner or next(
            (cause for a in attributes if (cause := getattr(seen, a, None))), None
        )
        if not isinstance(inner, BaseException):
            break
        seen = inner
    return seen


def _first_line(error: BaseException) -> str:
    """The line of Ray's long texts that says what happened."""
    if said := out_of_memory.explain(str(error)):
        return said
    lines = (str(error).strip() or repr(error)).splitlines()
    telling = [line for line in lines if re.search(TELLING, line, re.I)]
    text = re.sub(r"\.? (Worker exit|Node Id|Some common).*", "", (telling or lines)[0])
    return redact(re.sub("The actor (is dead|died) because its", "a", text).strip())
