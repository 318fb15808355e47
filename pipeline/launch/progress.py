"""What the user sees while a job trains: one live line, or plain lines when not a terminal."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

from pipeline.rundir.journal import Reader
from pipeline.rundir.records import Message, Numbers, Recomputed, Recomputing, Start

if TYPE_CHECKING:
    from pipeline.launch.gauges import Gauges

LIVE_SECONDS = 0.2
PLAIN_SECONDS = float(os.environ.get("PIPELINE_PROGRESS_SECONDS", "10"))
WAITING_SECONDS = 10.0
RECORD_SECONDS = 2.0
IDLE_SECONDS = 30.0
"""Without a step, after which that is said."""
NUM_METRICS = 2
"""Of the last evaluation, that are shown."""
CLEAR = "\r\x1b[2K"


class Progress:
    """Follows a journal in a thread and shows where the run is."""

    def __init__(
        self,
        reader: Reader,
        num_steps: int,
        steps_per_epoch: int,
        num_rows: int,
        trouble: Callable[[], str],
        waiting: str = "",
        gauges: Gauges | None = None,
    ) -> None:
        """`trouble` says what keeps MLflow from being told, `waiting` what the first step takes."""
        self.reader = reader
        self._gauges = gauges
        self.num_steps = num_steps
        self.steps_per_epoch = steps_per_epoch
        self._trouble = trouble
        self._told_trouble = ""
        self._waiting = waiting
        self.rows_per_step = num_rows / steps_per_epoch
        self.stream: TextIO = sys.stderr
        self.live = self.stream.isatty()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._train: Numbers = {}
        self._validation: Numbers = {}
        self._again = ""
        self._step = self._last_shown = 0
        self._started = (0, 0.0)
        self._began = self._last_read = time.monotonic()

    def __enter__(self) -> Progress:
        if self._waiting:
            self._line(f"{self._waiting} ...", end="\r" if self.live else "\n")
        self._thread.start()
        return self

    def note(self, text: str) -> None:
        """A line that stays."""
        self._say(text)

    def wait_for(self, text: str) -> None:
        """Show from now on that this is waited for, until there is a step."""
        self._waiting = text

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        shown = looked = 0.0
        had_begun = False
        while not self._stop.wait(LIVE_SECONDS):
            self._read()
            if self._gauges:
                self._gauges.publish()
            now = time.monotonic()
            if now - looked >= RECORD_SECONDS:
                looked = now
                self._look_at_record()
            has_begun = bool(self._step or self._again)
            seconds = PLAIN_SECONDS if has_begun else WAITING_SECONDS
            if self.live or now - shown >= seconds or has_begun != had_begun:
                shown, had_begun = now, has_begun
                self._show(end="\r" if self.live else "\n")
        self._read()
        self._again = ""
        if self._step and (self.live or self._step != self._last_shown):
            self._show(end="\n")
        elif self.live:
            self._line("", end="")

    def _read(self) -> None:
        for point in self.reader.new():
            if self._gauges:
                self._gauges.observe(point)
            if "event" in point:
                if point["event"] == "recomputing" or point["event"] == "recomputed":
                    self._show_recomputation(point)
                elif point["event"] != "stop":
                    self._tell(point)
            elif "validation" in point:
                self._validation = point["validation"]
            else:
                self._train = point["train"]
                self._step = point["step"]
                self._last_read = time.monotonic()
                self._again = ""
                if not self._started[0]:
                    self._started = (point["step"], point["time"] / 1000)
                self._now = point["time"] / 1000
                if "skipped" in point:
                    rows = ", ".join(map(str, point["skipped"][:8]))
                    cause = f", from rows {rows}" if rows else " in its gradient"
                    self._say(f"step {point['step']} is skipped: not finite{cause}")

    def _look_at_record(self) -> None:
        """Say once that MLflow does not take the record, and once that it does again."""
        now = self._trouble()
        if bool(now) != bool(self._told_trouble):
            self._say(
                f"MLflow cannot be told: {now}; training continues, it is tried again"
                if now
                else "MLflow is told again"
            )
        self._told_trouble = now

    def _show_recomputation(self, event: Recomputing | Recomputed) -> None:
        """How far it has come; at its end, whether it gave the same numbers."""
        if event["event"] == "recomputing":
            self._again = f"step {event['step']} of {event['reached']}, recomputed"
            return
        self._again = ""
        num_steps = event["num_steps"]
        if "differs" in event and event["differs"] is None:
            steps = f"{num_steps:,} steps were" if num_steps > 1 else "1 step was"
            self._say(f"{steps} recomputed, with the numbers that stand in the curve")

    def _tell(self, event: Start | Message) -> None:
        """A line for what happened to the run; the first start is not worth one."""
        if event["event"] != "start":
            text = event["text"]
        elif event["attempt"] == 1 and "after" not in event:
            return
        else:
            text = _describe_resumption(event)
        self._started, self._again = (0, 0.0), ""  # speed is measured anew
        self._say(text)

    def _say(self, text: str) -> None:
        self._write(f"{CLEAR if self.live else ''}note  {text}\n")

    def _show(self, end: str) -> None:
        if self._again:
            self._line(self._again, end)
            return
        if not self._step:
            waited = time.monotonic() - self._began
            if self._waiting and waited >= 1:
                self._line(f"{self._waiting} ... {waited:.0f} s", end)
            return
        self._last_shown = self._step
        steps = self._step - self._started[0]
        seconds = self._now - self._started[1]
        speed = steps / seconds if self._started[0] and steps and seconds > 0 else 0.0
        num_epochs = -(-self.num_steps // self.steps_per_epoch)
        epoch = min(self._step // self.steps_per_epoch + 1, num_epochs)
        loss = self._train["loss"]
        parts = [
            f"epoch {epoch}/{num_epochs}",
            f"step {self._step}/{self.num_steps}",
            "loss (none)" if loss is None else f"loss {loss:.4g}",
        ]
        known = {k: v for k, v in self._validation.items() if v is not None}
        metrics = {k: v for k, v in known.items() if k.partition("/")[0] != "loss"} or known
        if metrics:  # the most telling ones come first
            shown = [f"{k} {v:.4g}" for k, v in list(metrics.items())[:NUM_METRICS]]
            parts.append(f"val {', '.join(shown)}")
        if speed:
            left = (self.num_steps - self._step) / speed
            if left >= 1:
                parts.append(f"{_clock(left)} left")
            parts.append(f"{speed * self.rows_per_step:,.0f} rows/s")
        if (idle := time.monotonic() - self._last_read) > IDLE_SECONDS:
            parts.append(f"no step for {_clock(idle)}")
        self._line("  ".join(parts), end)

    def _line(self, text: str, end: str) -> None:
        """A line, of which a terminal shows as many parts as fit."""
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            while len(text) > width and "  " in text:
                text = text.rpartition("  ")[0]
            text = CLEAR + text[:width]
        self._write(text + end)

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # nobody may read it any more
            self.stream.write(text)
            self.stream.flush()


def _describe_resumption(start: Start) -> str:
    """A run's second or later start."""
    step = start["step"]
    num_workers = start["workers"]
    num_lost = start["reached"] - step
    on = f"with {num_workers} worker{'s' if num_workers > 1 else ''} (attempt {start['attempt']})"
    text = f"resuming from step {step} {on}" if step else f"starting again at step 0 {on}"
    if num_lost > 0:
        steps = f"{num_lost:,} steps are" if num_lost > 1 else "1 step is"
        text += f": {steps} recomputed"
    return f"{start['after']}; {text}" if "after" in start else text


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
