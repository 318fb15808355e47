"""How fast a run trains, and on what its time is spent."""

from __future__ import annotations

from pipeline.rundir.records import Numbers
from pipeline.telemetry.cadence import Cadence
from pipeline.telemetry.flops import TERA
from pipeline.telemetry.stopwatch import PHASES, Stopwatch


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
        self.is_told = False
        """Whether anything was said yet: a run may end early before a second is over."""

    def step(self, num_rows: int, is_last: bool) -> Numbers | None:
        """A step of so many rows is done; what there is to say, every second or so.

        `seconds` that it speaks of, `rows_per_second`, `share/PHASE` (of the time, 1 together), and
        where they are known `teraflops_per_second` and `mfu`: the share of what the devices can do.
        """
        self._num_rows += num_rows
        if not (self._cadence.is_due() or is_last):
            return None
        if not self._num_rows:  # a last evaluation, when all of training is told already
            return None
        seconds = self._stopwatch.take()
        total = sum(seconds.values())
        if not total:
            return None
        rows_per_second = self._num_rows / total
        self._num_rows = 0
        self.is_told = True
        numbers: Numbers = {"seconds": total, "rows_per_second": rows_per_second}
        if self._flops_per_row is not None:
            flops = rows_per_second * self._flops_per_row
            numbers["teraflops_per_second"] = flops / TERA
            if self._peak_flops is not None:
                numbers["mfu"] = flops / self._peak_flops
        return numbers | {f"share/{phase}": seconds[phase] / total for phase in PHASES}
