"""When to look again: often at first, less often in a long run."""

from __future__ import annotations

import threading
import time

SHORTEST_SECONDS, LONGEST_SECONDS = 1.0, 10.0
NUM_READINGS = 60
"""In a run of a few minutes."""


class Cadence:
    """Every second at first, every ten after some minutes."""

    def __init__(self) -> None:
        self._started = self._last = time.monotonic()

    @property
    def seconds(self) -> float:
        """Between the last look and the next."""
        past = self._last - self._started
        return min(max(past / NUM_READINGS, SHORTEST_SECONDS), LONGEST_SECONDS)

    @property
    def passed(self) -> float:
        """Seconds since the last look."""
        return time.monotonic() - self._last

    def is_due(self) -> bool:
        """Whether to look now; the next time is counted from here if so."""
        if self.passed < self.seconds:
            return False
        self.look()
        return True

    def look(self) -> None:
        """The last look was now."""
        self._last = time.monotonic()

    def wait(self, stop: threading.Event) -> bool:
        """Wait until the next look is due, or for `stop`; whether that is set."""
        return stop.wait(max(self.seconds - self.passed, 0.0))
