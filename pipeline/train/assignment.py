"""What a worker is told: which job it trains, in which run's folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.rundir import RunDir
from pipeline.spec import JobSpec
from pipeline.train.fault_injection import Fault
from pipeline.train.job import Job


@dataclass(frozen=True)
class Assignment:
    """Everything that a worker needs to train."""

    spec: JobSpec
    base: Path
    """Where relative paths of the spec start; in a Ray job, below the working directory."""
    run: RunDir
    modules: list[str]
    """Custom modules, whose sources are in the run's folder."""
    origins: dict[str, str]
    """Where the user has these sources, for tracebacks."""
    fingerprint: str
    """Fingerprint of the rows."""
    versions: dict[str, str]
    """Of Python and packages, as the command has them."""
    launcher: str = ""
    """Id of the command, as it stands in the run's record."""
    job: Job | None = None
    """The job itself, where the command trains in its own process."""
    faults: Sequence[Fault] = ()
    num_steps: int | None = None
    """Train only so many."""
