"""A job spec made concrete: its rows as tensors, its losses bound to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import Tensor

from pipeline.data import cache
from pipeline.data.batch import Batch
from pipeline.data.convert import Report
from pipeline.data.sampler import Sampler, WeightedSampler, WindowSampler, steps_per_epoch
from pipeline.data.sampling import row_weights
from pipeline.data.streaming import Streamed
from pipeline.errors import DataError
from pipeline.losses.bind import readings
from pipeline.losses.objective import Objective
from pipeline.losses.terms import Term
from pipeline.schedules import learning_rate_factor
from pipeline.spec import JobSpec
from pipeline.train.build import bind_seeded, build_objective


@dataclass(frozen=True, repr=False)
class Job(cache.ConvertedRows):
    """What every worker needs: the same on each, a pure function of spec and data."""

    spec: JobSpec
    initial: Mapping[str, Tensor] | None = None
    """Weights of the model that `model.init_from` names."""

    @property
    def num_rows(self) -> int:
        """Training rows."""
        return len(self.train)

    @cached_property
    def terms(self) -> list[Term]:
        """The losses, bound to their targets."""
        return bind_seeded(self.spec, self.fields)

    @cached_property
    def trial(self) -> Batch:
        """The first training rows and the longest lists: enough to see a mistake, quick to try."""
        first = np.arange(min(self.num_rows, self.spec.training.batch_size, 64))
        longest = [int(np.diff(lists.offsets).argmax()) for lists in self.train.lists.values()]
        return self.train.gather(np.unique([*first, *longest]))

    def objective(self) -> Objective:
        """Model and losses as they are before the first step, tried on the `trial` rows."""
        return build_objective(self.spec, self.fields, self.terms, self.trial, self.initial)

    def sampler(self) -> Sampler | WindowSampler:
        """Which rows each step uses."""
        settings = self.spec.training
        seed = settings.seed if settings.shuffle else None
        if sampling := self.spec.data.sampling:
            weights, classes = row_weights(self.train, sampling)
            num_rows, size = self.rows_per_epoch, settings.batch_size
            return WeightedSampler(weights, num_rows, size, settings.seed, classes)
        if isinstance(self.train, Streamed):
            plan = self.train.plan
            return WindowSampler(
                plan.bounds, settings.batch_size, seed, plan.window, self.num_epochs
            )
        lengths = None
        if settings.bucket_by is not None:
            lengths = np.diff(self.train.lists[settings.bucket_by].offsets)
        return Sampler(self.num_rows, settings.batch_size, seed, lengths)

    @property
    def rows_per_epoch(self) -> int:
        """Rows of an epoch: each training row once, or as many as `data.sampling` draws."""
        sampling = self.spec.data.sampling
        return (sampling and sampling.rows) or self.num_rows

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return steps_per_epoch(self.rows_per_epoch, self.spec.training.batch_size)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run, unless it ends early."""
        settings = self.spec.training
        in_epochs = settings.epochs and settings.epochs * self.steps_per_epoch
        return min(number for number in (in_epochs, settings.max_steps) if number)

    @property
    def num_epochs(self) -> int:
        """Epochs of the whole run, the last one perhaps in part."""
        return -(-self.num_steps // self.steps_per_epoch)

    @property
    def steps_per_evaluation(self) -> int:
        """Optimizer steps from one evaluation to the next."""
        return self.spec.training.evaluate_every.in_steps(self.steps_per_epoch)

    def is_evaluated(self, step: int, last_step: int) -> bool:
        """Whether the validation rows are looked at after `step` steps."""
        is_due = step % self.steps_per_evaluation == 0 or step == last_step
        return self.validation is not None and is_due

    def learning_rate_factor(self, step: int) -> float:
        """What the schedule makes of the optimizer's learning rate at a step, from 0."""
        schedule, num_steps = self.spec.schedule, self.num_steps
        if schedule.by == "epoch":
            step, num_steps = step // self.steps_per_epoch, self.num_epochs
        return learning_rate_factor(
            schedule.name, schedule.options, schedule.warmup_steps, step, num_steps
        )

    @property
    def num_validation_rows(self) -> int:
        """Validation rows, 0 without validation."""
        return len(self.validation) if self.validation else 0

    @property
    def num_test_rows(self) -> int:
        """Test rows, 0 without a test."""
        return len(self.test) if self.test else 0


def prepare(
    spec: JobSpec,
    base: Path,
    report: Report = lambda _: None,
    trusted_seconds: float = 0.0,
    initial: Mapping[str, Tensor] | None = None,
) -> Job:
    """The spec's rows, converted now or found in the cache, which is read through once.

    `initial` are the weights that `model.init_from` names. `report` is told how far a
    conversion has come. Raises DataError naming file and column.
    """
    float_dtype = np.float64 if spec.training.precision == "float64" else np.float32
    converted = cache.load_or_convert(
        spec.data,
        base,
        readings(spec),
        float_dtype,
        spec.cache,
        report=report,
        trusted_seconds=trusted_seconds,
    )
    bucket = spec.training.bucket_by
    if bucket is not None and bucket not in converted.train.lists:
        lists = ", ".join(converted.train.lists) or "there are none"
        raise DataError(f"training.bucket_by: {bucket!r} is not a column of lists ({lists})")
    return Job(**vars(converted), spec=spec, initial=initial)
