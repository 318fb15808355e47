"""A journal's points as values of MLflow's metrics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.rundir.records import Numbers, Point, SystemReading
from pipeline.tracking.names import mlflow_key

SYSTEM = "system"
"""Metrics that the page shows on a tab of their own."""


@dataclass(frozen=True)
class Value:
    """One value of a metric."""

    key: str
    value: float
    time: int
    """Milliseconds since 1970."""
    step: int


def values_of(point: Point) -> Iterator[Value]:
    """The metrics of a step or an evaluation.

    The page draws each group in a section of its own, in the order of their names, and those below
    `system/` on a tab of their own.
    """
    groups: dict[str, Numbers] = {}
    if "train" in point:
        skipped = {"skipped": 1.0} if "skipped" in point else {}
        groups["train"] = {**point["train"], **skipped}
        groups["norms"] = point.get("norms", {})
        groups["train/loss"] = point["terms"] if len(point["terms"]) > 1 else {}
    elif "validation" in point:
        groups["validation"] = point["validation"]
        groups["validation/baseline"] = point.get("baselines", {})
    if "event" not in point:
        speed = point.get("throughput", {})
        groups[f"{SYSTEM}/throughput"] = {k: v for k, v in speed.items() if k != "seconds"}
    for group, numbers in groups.items():
        yield from values(group, numbers, point["time"], point["step"])


def values_of_reading(reading: SystemReading) -> Iterator[Value]:
    """The metrics of a machine's load; those below `node_<N>` have filters of their own."""
    group = f"{SYSTEM}/node_{reading['node']}"
    yield from values(group, reading["values"], reading["time"], reading["step"])


def is_of_system(value: Value) -> bool:
    """Whether it tells of the machines, and not of what they train."""
    return value.key.startswith(f"{SYSTEM}/")


def values(group: str, numbers: Numbers, time: int, step: int) -> Iterator[Value]:
    """The metrics of one group that have a number."""
    for name, value in numbers.items():
        if value is not None:
            yield Value(mlflow_key(f"{group}/{name}"), float(value), time, step)
