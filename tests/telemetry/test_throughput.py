"""Rows a second, and shares of the time."""

from __future__ import annotations

import time

import pytest

from pipeline.telemetry.stopwatch import Stopwatch
from pipeline.telemetry.throughput import Throughput


def test_rows_flops_and_shares_are_of_the_time_since_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    stopwatch = Stopwatch()
    measured = Throughput(stopwatch, flops_per_row=2e9, peak_flops=4e12)
    now += 0.06
    stopwatch.lap("forward_backward")
    now += 0.02
    stopwatch.lap("exchange")
    assert measured.step(100, is_last=False) is None
    numbers = measured.step(20, is_last=True)
    assert numbers is not None
    assert numbers["rows_per_second"] == pytest.approx(1500)
    assert numbers["seconds"] == pytest.approx(0.08)
    teraflops = 1500 * 2e9 / 1e12
    assert numbers["teraflops_per_second"] == pytest.approx(teraflops)
    assert numbers["mfu"] == pytest.approx(teraflops / 4)
    shares = {name: value for name, value in numbers.items() if name.startswith("share/")}
    assert sum(value or 0 for value in shares.values()) == pytest.approx(1)
    assert shares["share/forward_backward"] == pytest.approx(0.75)


def test_a_last_evaluation_has_no_speed_of_training() -> None:
    stopwatch = Stopwatch()
    measured = Throughput(stopwatch, flops_per_row=2e9, peak_flops=4e12)
    stopwatch.lap("forward_backward")
    assert "rows_per_second" in (measured.step(100, is_last=True) or {})
    stopwatch.lap("evaluation")
    assert measured.step(0, is_last=True) is None


def test_what_is_not_known_is_left_out() -> None:
    stopwatch = Stopwatch()
    stopwatch.lap("optimizer")
    numbers = Throughput(stopwatch, None, None).step(1, is_last=True)
    assert numbers is not None
    assert not {"teraflops_per_second", "mfu"} & set(numbers)
