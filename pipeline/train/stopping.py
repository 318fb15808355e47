"""When training ends early: after the same step on every worker, and in every attempt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypedDict

from pipeline.distributed import comm
from pipeline.losses.terms import Term
from pipeline.rundir.records import Numbers
from pipeline.spec.sections import Stop
from pipeline.train.best import is_lower_better
from pipeline.train.term_metrics import TermMetric


class StopState(TypedDict):
    """What a checkpoint holds of it."""

    best: float | None
    """None before the first value."""
    best_step: int
    num_since: int
    """Evaluations since then."""


class EarlyStop:
    """Counts the evaluations since a metric was at its best."""

    def __init__(self, settings: Stop, terms: list[Term], metrics: Sequence[TermMetric]) -> None:
        """Raises UsageError for a metric that no evaluation has, or without a direction."""
        self.settings = settings
        self._sign = 1.0
        if is_lower_better("training.stop.metric", settings.metric, terms, metrics):
            self._sign = -1.0
        self.state: StopState = {"best": None, "best_step": 0, "num_since": 0}

    def update(self, step: int, values: Numbers) -> None:
        """Take in an evaluation; that before the first step does not count."""
        if not step:
            return
        value = values[self.settings.metric]
        if value is not None and math.isfinite(value) and self._is_better(value):
            self.state = {"best": value, "best_step": step, "num_since": 0}
        else:
            self.state = {**self.state, "num_since": self.state["num_since"] + 1}
        self.state = comm.from_first(self.state)  # a user's metric may differ among workers

    def _is_better(self, value: float) -> bool:
        best = self.state["best"]
        return best is None or self._sign * (value - best) > self.settings.min_delta

    @property
    def is_due(self) -> bool:
        """Whether training ends."""
        return self.state["num_since"] >= self.settings.patience

    @property
    def reason(self) -> str:
        """Why it does; empty while it does not."""
        if not self.is_due:
            return ""
        patience, metric, best = self.settings.patience, self.settings.metric, self.state["best"]
        evaluations = f"{patience} evaluation{'s' if patience > 1 else ''}"
        if best is None:
            return f"{metric} had no value in {evaluations}"
        since = f"since the {best:.6g} of step {self.state['best_step']:,}"
        return f"{metric} is no better in {evaluations} {since}"
