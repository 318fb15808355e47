"""What can go wrong, and the exit code that says so.

PipelineError
├── InputError            2  the spec, the command or the data is wrong: correct it and run again
│   ├── SpecError            every fault of a job spec, with line, key path and the nearest name
│   ├── UsageError           the command line or a Python call is wrong
│   ├── DataError            a file, column or row is not what the spec says
│   └── ContractError        loss, prediction and target do not fit each other
├── RunError              1  training started and did not finish
│   ├── NonFiniteError       a loss or gradient became NaN or infinite; names the step
│   └── StoppedError  130, 143  Ctrl-C or SIGTERM: the state is saved, the same command resumes
└── RecordError           3  training finished, its record in MLflow is not complete
    └── UnrecordedError      of `pipeline.run`; carries the result

An error hands its facts to `super().__init__` and words them in `__str__`, so that it survives
pickling between processes.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


class PipelineError(Exception):
    """Any failure this package knows how to explain.

    `run` says where the run that failed is: its `storage`, `run_id` and `tracking_uri`.
    """

    exit_code = 1
    run: Mapping[str, str | None] = MappingProxyType({})


class InputError(PipelineError):
    """Wrong input: found before training, unless a worker sees other rows or devices."""

    exit_code = 2


@dataclass(frozen=True)
class Fault:
    """One thing wrong in a job spec: where it stands, what it is, what would be right."""

    path: str
    problem: str
    line: int | None = None
    advice: str = ""

    def __str__(self) -> str:
        line = f"line {self.line}, " if self.line else ""
        advice = f"\n      {self.advice}" if self.advice else ""
        return f"{line}{self.path}: {self.problem}{advice}"


class SpecError(InputError):
    """Every fault found in one job spec."""

    def __init__(self, source: str, faults: list[Fault]) -> None:
        super().__init__(source, faults)
        self.source, self.faults = source, faults

    def __str__(self) -> str:
        count = f"{len(self.faults)} fault{'s' if len(self.faults) > 1 else ''}"
        return "\n".join([f"{self.source}: {count}", *(f"  {fault}" for fault in self.faults)])


class UsageError(InputError):
    """A command line or Python call that cannot be carried out."""


class DataError(InputError):
    """Data that is not what the spec says: the file or column is named in the message."""


class ContractError(InputError):
    """A loss that does not fit its prediction or target; `fix` says what would."""

    def __init__(self, term: str, problem: str, fix: str) -> None:
        super().__init__(term, problem, fix)
        self.term = term
        self.problem = problem
        self.fix = fix

    def __str__(self) -> str:
        return f"loss {self.term}: {self.problem}\n  fix: {self.fix}"


class RunError(PipelineError):
    """A run that started and did not finish."""


class NonFiniteError(RunError):
    """A loss or gradient that is NaN or infinite, found before the optimizer moved.

    `microbatches` are the indices of those whose loss is not finite (none if only a gradient is
    not), `rows` the training rows in them, counted from 0, once the loop has added them.
    """

    def __init__(
        self,
        step: int,
        gradient_norm: float,
        terms: dict[str, float],
        microbatches: Sequence[int] = (),
        rows: Sequence[int] = (),
    ) -> None:
        super().__init__(step, gradient_norm, terms, tuple(microbatches), tuple(rows))
        self.step = step
        self.gradient_norm = gradient_norm
        self.terms = terms
        self.microbatches = tuple(microbatches)
        self.rows = tuple(rows)

    def with_rows(self, microbatches: Sequence[Iterable[int]]) -> NonFiniteError:
        """The error with the rows of its micro-batches, out of those of all."""
        rows = [int(row) for index in self.microbatches for row in microbatches[index]]
        return NonFiniteError(self.step, self.gradient_norm, self.terms, self.microbatches, rows)

    def __str__(self) -> str:
        terms = ", ".join(f"{name} = {value:g}" for name, value in self.terms.items())
        where = ""
        if self.rows:
            shown = ", ".join(map(str, self.rows[:8])) + (", ..." if len(self.rows) > 8 else "")
            indices = ", ".join(map(str, self.microbatches[:8]))
            where = (
                f"\n  from {len(self.rows)} training rows (counted from 0: {shown}; micro-batch "
                f"{indices} of the step), kept in nonfinite.json of the run's folder"
            )
        return (
            f"step {self.step}: gradient norm {self.gradient_norm:g}, {terms}; the optimizer did "
            f"not take this step{where}\n"
            "  usual causes: a learning rate that is too high, no training.clip_norm, a bad value "
            "in a row, inputs that are not scaled\n"
            "  the same command with --set training.skip_nonfinite=N skips up to N such steps"
        )


class StoppedError(RunError):
    """A command that was stopped by a signal, and can be resumed.

    `where` says from where, as the end of a sentence.
    """

    def __init__(
        self, number: int, where: str = "; the same command resumes from its newest checkpoint"
    ) -> None:
        super().__init__(number, where)
        self.number, self.where = number, where
        self.exit_code = 128 + number  # what shells report

    def __str__(self) -> str:
        name = "Ctrl-C" if self.number == signal.SIGINT else signal.Signals(self.number).name
        return f"stopped by {name}{self.where}"


class RecordError(PipelineError):
    """Training finished, but MLflow does not hold the whole record."""

    exit_code = 3


class UnrecordedError(RecordError):
    """Training is done and kept in `result.storage`; MLflow lacks some or all of its record."""

    def __init__(self, result: Any, reason: str) -> None:
        super().__init__(result, reason)
        self.result, self.reason = result, reason

    def __str__(self) -> str:
        return (
            f"trained, but the record in MLflow is not complete: {self.reason}\n"
            f"  everything is kept in {self.result.storage}\n"
            f"  finish it with: pipeline sync {self.result.storage}"
        )
