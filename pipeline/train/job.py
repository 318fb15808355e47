"""A job spec made concrete: its rows as tensors, its model and losses bound to them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pipeline import registry
from pipeline.data import source
from pipeline.data.batch import Batch
from pipeline.data.columns import Columns, Field, encode, fit, gather
from pipeline.errors import InputError, UsageError
from pipeline.losses import fit as fitting
from pipeline.losses.objective import Objective, tried
from pipeline.losses.terms import bind, class_targets, outputs
from pipeline.spec import JobSpec


@dataclass(frozen=True)
class Job:
    """What every worker needs: the same on each, a pure function of spec and data."""

    spec: JobSpec
    fields: list[Field]
    train: Columns
    validation: Columns | None
    fingerprint: str
    """SHA-256 of the data."""
    example: source.Source
    """The raw rows, for the served model's signature."""

    @property
    def num_rows(self) -> int:
        """Training rows."""
        return len(next(iter(self.train.values())))

    @property
    def num_validation_rows(self) -> int:
        """Validation rows, 0 without validation."""
        return len(next(iter(self.validation.values()))) if self.validation else 0


def prepared(spec: JobSpec, base: Path) -> Job:
    """Read the rows and fit their preprocessing. Raises DataError naming file and column."""
    read = source.read(spec.data, base)
    fields = fit(spec.data, read.inputs, read.train, class_targets(spec))
    train = encode(fields, read.train, spec.data.shift)
    validation = encode(fields, read.validation, spec.data.shift) if read.validation else None
    return Job(spec, fields, train, validation, read.fingerprint, read)


def objective(spec: JobSpec, fields: list[Field], trial: Batch | None = None) -> Objective:
    """Model and losses of the spec, freshly initialised from its seed.

    `trial` is a batch on which users' losses are tried; without it they have no denominator,
    which only training needs.
    """
    terms = bind(spec, fields)
    made = outputs(terms, spec)
    inputs = {field.name: field for field in fields if not field.is_target}
    torch.manual_seed(spec.training.seed)
    build = registry.models[spec.model.name].build
    parameters = inspect.signature(build).parameters.values()
    wanted = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    try:
        model = build(*(inputs, made)[: len(wanted)], **spec.model.options)
        bound = Objective(model, terms, {name: output.size for name, output in made.items()})
        if trial is not None:
            bound.terms = tried(terms, bound, trial)
    except InputError:
        raise
    except Exception as error:  # a user's model can fail in any way: say where, keep the cause
        raise UsageError(f"model {spec.model.name}: {type(error).__name__}: {error}") from error
    if spec.training.precision == "bfloat16":
        bound.precision = torch.bfloat16
    return bound


def trial_batch(job: Job) -> Batch:
    """The first training rows, enough to see a mistake and quick to compute."""
    return gather(job.train, np.arange(min(job.num_rows, job.spec.training.batch_size, 64)))


def check(job: Job) -> list[fitting.Notice]:
    """Everything that can be known before training. Raises ContractError with the fix."""
    targets = {field.name for field in job.fields if field.is_target}
    bound = objective(job.spec, job.fields, trial_batch(job))
    for columns in (job.train, job.validation):
        if columns is not None:
            rows = np.arange(len(next(iter(columns.values()))))
            only = {name: column for name, column in columns.items() if name in targets}
            if only:
                fitting.check_targets(bound.terms, gather(only, rows))
    try:
        notices = fitting.check_batch(bound, trial_batch(job))
    except InputError:
        raise
    except Exception as error:
        raise UsageError(
            f"model {job.spec.model.name}: fails on the first rows: {type(error).__name__}: {error}"
        ) from error
    size = job.spec.training.batch_size
    if size > job.num_rows:
        text = f"{size} is more than the {job.num_rows} training rows: one step per epoch"
        notices.append(fitting.Notice("training.batch_size", text))
    return notices


__all__ = ["Job", "check", "objective", "prepared", "trial_batch"]
