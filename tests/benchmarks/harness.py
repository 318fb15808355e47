"""What benchmarks share: contestants take turns, and a result is one line of JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")
Result = dict[str, Any]
"""Figures by name; `case` says of what."""


def take_turns(contestants: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """What each contestant measured in each round.

    One after the other, so that whatever else the machine does meets all of them alike.
    """
    measured: dict[str, list[T]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, measure in contestants.items():
            measured[name].append(measure())
    return measured


def shorten(value: Any) -> Any:
    """Numbers with three significant digits, as a machine with other work can give them."""
    if isinstance(value, dict):
        return {key: shorten(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [shorten(item) for item in value]
    if not isinstance(value, float):
        return value
    return float(f"{value:.3g}") if math.isfinite(value) else str(value)  # JSON has no word for it
