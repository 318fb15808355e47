"""Each phase gets the time that passed in it."""

from __future__ import annotations

import time

import pytest
import torch

from pipeline.telemetry.stopwatch import CudaStopwatch, Stopwatch


def test_seconds_go_to_the_phase_that_ends_and_are_taken_once() -> None:
    stopwatch = Stopwatch.on(torch.device("cpu"))
    started = time.perf_counter()
    time.sleep(0.05)
    stopwatch.lap("waiting_for_rows")
    time.sleep(0.02)
    stopwatch.lap("exchange")
    time.sleep(0.05)
    stopwatch.lap("waiting_for_rows")
    passed = time.perf_counter() - started
    seconds = stopwatch.take()
    assert seconds["waiting_for_rows"] >= 0.1
    assert seconds["exchange"] >= 0.02
    assert seconds["optimizer"] == 0
    assert sum(seconds.values()) == pytest.approx(passed, abs=0.01)
    assert not any(stopwatch.take().values())
    time.sleep(0.05)
    stopwatch.restart()
    stopwatch.lap("waiting_for_rows")
    assert sum(stopwatch.take().values()) < 0.04


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_time_is_when_its_work_is_done() -> None:
    device = torch.device("cuda")
    stopwatch = Stopwatch.on(device)
    assert isinstance(stopwatch, CudaStopwatch)
    matrix = torch.randn(8192, 8192, device=device)
    torch.cuda.synchronize()
    stopwatch.take()
    started = time.perf_counter()
    for _ in range(20):
        matrix @ matrix
    stopwatch.lap("forward_backward")
    stopwatch.lap("optimizer")
    seconds = stopwatch.take()
    passed = time.perf_counter() - started
    assert seconds["forward_backward"] == pytest.approx(passed, rel=0.2)
    assert seconds["optimizer"] < 0.01 * passed
