"""Runs side by side: what their specs differ in, how good they are, where their curves part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from pipeline.rundir.journal import Reader
from pipeline.rundir.records import Numbers
from pipeline.rundir.summary import Summary


@dataclass(frozen=True)
class Comparison:
    """Several runs, the first of which the others are compared with."""

    runs: Sequence[Summary]
    changes: dict[str, list[str]]
    """By key of the spec, where they differ: the value of each run, `-` without one."""
    metrics: dict[str, list[float | None]]
    """By name: the value of each run."""
    first_differences: list[int | None]
    """Of each run but the first: the first step whose loss is another one; None if none is."""
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
        [first_difference(first, other) for other in others],
        next(_losses(first), None) is not None,
        [first.record.data.fingerprint == other.record.data.fingerprint for other in others],
    )


def first_difference(one: Summary, other: Summary) -> int | None:
    """The first step whose loss differs, or that only one run has; None if the curves are one."""
    both = (_losses(each) for each in (one, other))
    for left, right in zip_longest(*both):
        if left != right:
            known = left or right
            assert known is not None
            return known[0]
    return None


def _losses(run: Summary) -> Iterator[tuple[int, Numbers]]:
    """Each step with its losses."""
    for point in Reader(run.run.journal).new():
        if "train" in point:
            yield point["step"], {"loss": point["train"]["loss"], **point["terms"]}
