"""Which failures of workers are worth another try: their death is, their own error is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray.train import UserCallback

from pipeline.errors import PipelineError, RunError
from pipeline.train import files
from pipeline.train.curve import Reader

FRUITLESS = 3
"""Deaths of workers, one after the other without a new step in between, that end the run."""


class Restarts(UserCallback):  # type: ignore[misc]
    """Ends the run where another try would fail again; Ray starts the workers anew elsewhere.

    Runs in Ray's controller, which gives up on what a callback raises.
    """

    def __init__(self, folder: str) -> None:
        self.folder, self.fruitless, self.step = Path(folder), 0, 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise the workers' own error, or RunError when workers die without getting on."""
        errors = [
            getattr(error, "_base_exc", None) or error for error in worker_exceptions.values()
        ]
        for error in errors:
            if isinstance(error, PipelineError):
                raise error
        own = [error for error in errors if not (is_echo(error) or is_death(error))]
        if own:
            raise own[0]
        self.count(errors[0])

    def count(self, error: BaseException) -> None:
        """One more death. Raises RunError when there were too many without a new step."""
        points = Reader(self.folder / files.CURVE).new()
        step = max((point["step"] for point in points), default=0)
        self.fruitless = self.fruitless + 1 if step <= self.step else 1
        self.step = max(step, self.step)
        if self.fruitless >= FRUITLESS:
            raise RunError(
                f"workers died {FRUITLESS} times after step {step} without getting further: "
                f"{_first_line(error)}. Usual causes: too little memory, a node that keeps failing"
            )


def is_echo(error: object) -> bool:
    """A worker that only failed because another did: its connection was closed."""
    text = str(error)
    return "Connection closed by peer" in text or "Connection reset" in text


def is_death(error: object) -> bool:
    """Ray's own word that a worker or its node is gone."""
    return type(error).__module__.startswith("ray.")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
