"""How fast a run trains, and on what its time is spent."""

from __future__ import annotations

import time

from pipeline.rundir.records import Numbers
from pipeline.telemetry.flops import TERA
from pipeline.telemetry.stopwatch import PHASES, Stopwatch

SHORTEST_SECONDS, LONGEST_SECONDS = 1.0, 10.0
NUM_READINGS = 60
"""In a run of a few minutes."""


class Cadence:
    """When to look again: every second at first, every ten after some minutes."""

    def __init__(self) -> None:
        self._started = self._last = time.monotonic()

    @property
    def seconds(self) -> float:
        """Between the last look and the next."""
        past = self._last - self._started
        return min(max(past / NUM_READINGS, SHORTEST_SECONDS), LONGEST_SECONDS)

    def is_due(self) -> bool:
        """Whether to look now; the next time is counted from here if so."""
        now = time.monotonic()
        if now - self._last < self.seconds:
            return False
        self._last = now
        return True


class Throughput:
    """Rows and FLOPs a second of the whole run, and the first worker's time by phase."""

    def __init__(
        self, stopwatch: Stopwatch, flops_per_row: float | None, peak_flops: float | None
    ) -> None:
        """`peak_flops` are those of all workers' devices together, in one second."""
        self._stopwatch = stopwatch
        self._flops_per_row, self._peak_flops = flops_per_row, peak_flops
        self._cadence = Cadence()
        self._num_rows = 0

    def step(self, num_rows: int, is_last: bool) -> Numbers | None:
        """A step of so many rows is done; what there is to say, every second or so.

        `rows_per_second`, `share/PHASE` (of the time, 1 together), and where they are known
        `teraflops_per_second` and `mfu`: the share of what the devices can do at most.
        """
        self._num_rows += num_rows
        if not (self._cadence.is_due() or is_last):
            return None
        seconds = self._stopwatch.take()
        total = sum(seconds.values())
        rows_per_second = self._num_rows / total
        self._num_rows = 0
        numbers: Numbers = {"rows_per_second": rows_per_second}
        if self._flops_per_row is not None:
            flops = rows_per_second * self._flops_per_row
            numbers["teraflops_per_second"] = flops / TERA
            if self._peak_flops is not None:
                numbers["mfu"] = flops / self._peak_flops
        return numbers | {f"share/{phase}": seconds[phase] / total for phase in PHASES}
