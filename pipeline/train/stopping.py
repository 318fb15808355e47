"""What follows from evaluations that are no better: the same on every worker, in every attempt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypedDict

from pipeline.distributed import comm
from pipeline.losses.terms import Term
from pipeline.rundir.records import Numbers
from pipeline.spec.sections import Stop
from pipeline.train.best import is_lower_better
from pipeline.train.term_metrics import TermMetric


class StopState(TypedDict):
    """What a checkpoint holds of the count."""

    best: float | None
    """None before the first value."""
    best_step: int
    num_since: int
    """Evaluations since then, or since something was done about it."""


class PlateauState(StopState):
    """What a checkpoint holds of the learning rate's factor too."""

    factor: float
    num_to_wait: int
    """Evaluations that do not count after the factor fell."""


class SinceBest:
    """Counts the evaluations since a metric was at its best."""

    state: StopState

    def __init__(
        self,
        key: str,
        metric: str,
        min_delta: float,
        terms: list[Term],
        metrics: Sequence[TermMetric],
    ) -> None:
        """`key` names the metric in the spec.

        Raises UsageError for a metric that no evaluation has, or without a direction.
        """
        self.metric, self.min_delta = metric, min_delta
        self._sign = -1.0 if is_lower_better(key, metric, terms, metrics) else 1.0
        self.state = {"best": None, "best_step": 0, "num_since": 0}

    def update(self, step: int, values: Numbers) -> None:
        """Take in an evaluation; that before the first step does not count."""
        if not step:
            return
        value = values[self.metric]
        if value is not None and math.isfinite(value) and self._is_better(value):
            changes = {"best": value, "best_step": step, "num_since": 0}
        else:
            changes = {"num_since": self.state["num_since"] + 1}
        # from the first worker, as a user's metric may differ among them
        self.state = comm.from_first({**self.state, **changes})

    def _is_better(self, value: float) -> bool:
        best = self.state["best"]
        return best is None or self._sign * (value - best) > self.min_delta


class EarlyStop(SinceBest):
    """Ends training after `training.stop.patience` evaluations that were no better."""

    def __init__(self, settings: Stop, terms: list[Term], metrics: Sequence[TermMetric]) -> None:
        super().__init__(
            "training.stop.metric", settings.metric, settings.min_delta, terms, metrics
        )
        self.settings = settings

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


class Plateau(SinceBest):
    """Lowers the learning rate after so many evaluations that were no better.

    As torch's ReduceLROnPlateau with an absolute threshold, but for its patience, which is one less
    than ours: here so many evaluations are no better, there one more.
    """

    state: PlateauState

    def __init__(
        self, options: dict[str, Any], terms: list[Term], metrics: Sequence[TermMetric]
    ) -> None:
        """`options` are those of the schedule `reduce_on_plateau`."""
        super().__init__("schedule.metric", options["metric"], options["min_delta"], terms, metrics)
        self.options = options
        self.state = {**self.state, "factor": 1.0, "num_to_wait": 0}

    def update(self, step: int, values: Numbers) -> None:
        super().update(step, values)
        if not step:
            return
        state, options = self.state, self.options
        if state["num_to_wait"]:
            state = {**state, "num_to_wait": state["num_to_wait"] - 1, "num_since": 0}
        if state["num_since"] >= options["patience"]:
            factor = max(state["factor"] * options["factor"], options["final"])
            state = {**state, "factor": factor, "num_since": 0, "num_to_wait": options["cooldown"]}
        self.state = state
