"""Where a run is, as gauges beside Ray's own, for Prometheus: `ray_pipeline_step` and its like.

The command sets them on its node of the cluster, whose port of metrics tells them. Times are in
seconds since 1970, so that `time() - x` is how long ago it was.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Mapping
from types import MappingProxyType

from pipeline.rundir import RunDir
from pipeline.rundir.records import Point

PUBLISH_SECONDS = 1.0
NAMES: Mapping[str, str] = MappingProxyType(
    {
        "pipeline_step": "Steps that are done.",
        "pipeline_num_steps": "Steps that the run has.",
        "pipeline_loss": "Training loss of the newest step; NaN where it is not finite.",
        "pipeline_rows_per_second": "Of training, since the last time this was told.",
        "pipeline_attempts": "Starts of the workers: more than one after a restart.",
        "pipeline_reached_step": "The furthest step that any attempt has done.",
        "pipeline_skipped_steps": "Steps that were skipped, as not finite.",
        "pipeline_last_step_time": "When the newest step was done.",
        "pipeline_last_checkpoint_time": "When the newest checkpoint was written.",
    }
)


class Gauges:
    """The gauges of one run.

    Times before the first step and the first checkpoint are those of the start, so that a run that
    never comes to one is seen.
    """

    def __init__(self, run: RunDir, job: str, num_steps: int, rows_per_step: float) -> None:
        from ray.util.metrics import Gauge

        self._run, self._rows_per_step = run, rows_per_step
        tags = {"job": job, "run": run.name}
        self._gauges = {
            name: Gauge(name, description=text, tag_keys=tuple(tags))
            for name, text in NAMES.items()
        }
        for gauge in self._gauges.values():
            gauge.set_default_tags(tags)
        self._values: dict[str, float] = {
            "pipeline_num_steps": num_steps,
            "pipeline_reached_step": 0,
            "pipeline_last_step_time": time.time(),
            "pipeline_last_checkpoint_time": time.time(),
        }
        self._skipped = 0
        self._told = (0.0, 0)
        """When, and at which step."""

    def observe(self, point: Point) -> None:
        """Take in a line of the curve."""
        if "event" in point:
            if point["event"] == "start":
                self._values["pipeline_attempts"] = point["attempt"]
            return
        if "validation" in point:
            return
        loss = point["train"]["loss"]
        self._skipped += "skipped" in point
        step = point["step"]
        reached = max(step, self._values.get("pipeline_reached_step", 0))
        self._values |= {
            "pipeline_step": step,
            "pipeline_reached_step": reached,
            "pipeline_loss": math.nan if loss is None else loss,
            "pipeline_skipped_steps": self._skipped,
            "pipeline_last_step_time": point["time"] / 1000,
        }

    def publish(self) -> None:
        """Tell what is known, every second or so."""
        now = time.time()
        if now - self._told[0] < PUBLISH_SECONDS:
            return
        step = int(self._values.get("pipeline_step", 0))
        if self._told[0]:
            rows = max(0, step - self._told[1]) * self._rows_per_step
            self._values["pipeline_rows_per_second"] = rows / (now - self._told[0])
        self._told = (now, step)
        if written := self._last_checkpoint():
            self._values["pipeline_last_checkpoint_time"] = written
        for name, value in self._values.items():
            self._gauges[name].set(value)

    def _last_checkpoint(self) -> float:
        with contextlib.suppress(OSError), os.scandir(self._run.checkpoints) as entries:
            return max((entry.stat().st_mtime for entry in entries), default=0.0)
        return 0.0
