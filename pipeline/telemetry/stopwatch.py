"""Where the time of training goes: seconds of each phase of its steps."""

from __future__ import annotations

import time
from typing import Literal, get_args

import torch

Phase = Literal[
    "waiting_for_rows",
    "forward_backward",
    "exchange",
    "optimizer",
    "evaluation",
    "checkpoint",
    "recording",
]
PHASES: tuple[Phase, ...] = get_args(Phase)


class Stopwatch:
    """Adds up this worker's seconds by phase; each lap is the time since the one before."""

    @staticmethod
    def on(device: torch.device) -> Stopwatch:
        """One that measures what the device does, on which calls may return before it is done."""
        return CudaStopwatch(device) if device.type == "cuda" else Stopwatch()

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._last = time.perf_counter()

    def lap(self, phase: Phase) -> None:
        """What ends here was part of `phase`."""
        now = time.perf_counter()
        self._seconds[phase] += now - self._last
        self._last = now

    def restart(self) -> None:
        """Forget what was before."""
        self.take()
        self._last = time.perf_counter()

    def take(self) -> dict[Phase, float]:
        """Seconds of each phase since they were taken last."""
        taken = self._seconds
        self._seconds = dict.fromkeys(PHASES, 0.0)
        return taken


class CudaStopwatch(Stopwatch):
    """Of a GPU: when it comes to the end of a phase, not when its work was handed over.

    A GPU that waits for the host counts the time for the phase in which it waits.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._laps: list[tuple[Phase, torch.cuda.Event]] = []
        self._start = self._mark()

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def lap(self, phase: Phase) -> None:
        """What ends here, once the GPU has come to it, was part of `phase`."""
        self._laps.append((phase, self._mark()))

    def restart(self) -> None:
        """Forget what was before."""
        self.take()
        self._start = self._mark()

    def take(self) -> dict[Phase, float]:
        """Seconds of each phase since they were taken last; waits for the GPU."""
        torch.cuda.synchronize(self._device)
        for phase, event in self._laps:
            self._seconds[phase] += self._start.elapsed_time(event) / 1000
            self._start = event
        self._laps.clear()
        return super().take()
