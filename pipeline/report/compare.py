"""Runs side by side: what their specs differ in, how good they are, where their curves part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from pipeline.rundir.journal import Reader
from pipeline.rundir.summary import Summary


@dataclass(frozen=True)
class Difference:
    """Between two curves."""

    first_step: int
    """The first step whose losses differ, or that only one of them has."""
    largest: float
    """The largest difference between losses of one step, relative to the larger one."""
    is_longer: bool = False
    """Whether they are the same as far as the shorter one goes."""


@dataclass(frozen=True)
class Comparison:
    """Several runs, the first of which the others are compared with."""

    runs: Sequence[Summary]
    changes: dict[str, list[str]]
    """By key of the spec, where they differ: the value of each run, `-` without one."""
    metrics: dict[str, list[float | None]]
    """By name: the value of each run."""
    differences: list[Difference | None]
    """Of each run but the first: how its curve differs; None where it does not."""
    has_curve: bool
    """Whether the first run has any step."""
    same_rows: list[bool]
    """Of each run but the first: whether it has the same rows."""


def compare(runs: Sequence[Summary]) -> Comparison:
    """The differences between two runs or more."""
    params = [dict(one.record.params) for one in runs]
    keys = list(dict.fromkeys(key for one in params for key in one))
    changes = {}
    for key in keys:
        values = [one.get(key, "-") for one in params]
        if len(set(values)) > 1:
            changes[key] = values
    names = list(dict.fromkeys(name for one in runs for name in one.metrics))
    metrics = {name: [one.metrics.get(name) for one in runs] for name in names}
    first, *others = runs
    return Comparison(
        runs,
        changes,
        metrics,
        [difference(first, other) for other in others],
        next(_losses(first), None) is not None,
        [first.record.data.fingerprint == other.record.data.fingerprint for other in others],
    )


def difference(one: Summary, other: Summary) -> Difference | None:
    """How the curves of two runs differ; None if they are the same."""
    first, largest = None, 0.0
    is_longer = False
    for left, right in zip_longest(_losses(one), _losses(other)):
        if left == right:
            continue
        known = left or right
        if first is None and known is not None:
            first, is_longer = known[0], left is None or right is None
        if left is not None and right is not None:
            largest = max(largest, _relative(left[1], right[1]))
    return None if first is None else Difference(first, largest, is_longer)


def _losses(run: Summary) -> Iterator[tuple[int, tuple[float | None, ...]]]:
    """Each step with the job's loss, and that of each term."""
    for point in Reader(run.run.journal).new():
        if "train" in point:
            yield point["step"], (point["train"]["loss"], *point["terms"].values())


def _relative(one: Sequence[float | None], other: Sequence[float | None]) -> float:
    """The largest relative difference, of losses that both have."""
    known = [(a, b) for a, b in zip(one, other, strict=False) if a is not None and b is not None]
    sizes = [abs(a - b) / max(abs(a), abs(b)) for a, b in known if a != b]
    return max(sizes, default=0.0)
