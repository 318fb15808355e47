"""A run is looked at often at first, and less often later."""

from __future__ import annotations

import time

import pytest

from pipeline.telemetry.cadence import Cadence


def test_a_long_run_is_looked_at_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    cadence = Cadence()
    looks = []
    for _ in range(36_000):
        now += 0.1
        if cadence.is_due():
            looks.append(now)
    assert len([look for look in looks if look < 60]) > 50
    assert looks[-1] - looks[-2] == pytest.approx(10, abs=0.2)
    assert len(looks) < 600
