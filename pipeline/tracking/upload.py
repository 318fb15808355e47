"""One run on its way to MLflow: journal, params, data sets, model, report, description.

It can be interrupted anywhere and begun again, from a high-water mark in the run's folder: a point
that MLflow has already is dropped there, since its time was fixed when it was first written.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from typing import Any

from pipeline.redact import redact
from pipeline.report.curves import Curves
from pipeline.report.drawing import Drawing
from pipeline.report.facts import last_values
from pipeline.rundir import RunDir
from pipeline.rundir.journal import Reader, points_at
from pipeline.rundir.records import (
    Done,
    Ended,
    EvaluationPoint,
    Record,
    Recorded,
    Scores,
    Start,
    StepPoint,
    SystemReading,
)
from pipeline.rundir.system import SystemReader
from pipeline.tracking.champion import Candidate
from pipeline.tracking.client import ERROR, NOTE, Client
from pipeline.tracking.names import environment_uri, with_password
from pipeline.tracking.note import Progress, describe
from pipeline.tracking.source import RAY_JOB, RAY_JOBS
from pipeline.tracking.values import (
    Value,
    is_of_system,
    values,
    values_of,
    values_of_reading,
)

BATCH = 1000  # MLflow's limit of metrics in one request
READINGS = 50  # of a machine's load in one request, which have a dozen metrics each
DESCRIBE_SECONDS = 30.0
"""Between changes of the description while a run trains."""
SETTLE_SECONDS = 2.0
"""How long what another machine is sending may take to arrive."""
WARNING = "pipeline.warning"
"""Tag of a run that ended well, and whose model is hardly of use: why."""


class SupersededError(Exception):
    """Another command has resumed the run, from its backup, and records it."""


class Upload:
    """One run on its way to MLflow; the folder's `recorded.json` holds how far it has come."""

    def __init__(self, run: RunDir, drawing: Drawing) -> None:
        self.run = run
        self.drawing = drawing
        self.record = Record.read(run.record)
        before = run.read_recorded() if run.recorded.exists() else Recorded()
        if before.run_id:
            uri = with_password(before.tracking_uri)
        else:  # nothing is there yet: a server may have moved
            uri = environment_uri() or with_password(self.record.tracking_uri)
        facts = {"complete": False, "error": "", "tracking_uri": redact(uri)}
        self.state = before.model_copy(update=facts)
        self.reader = Reader(run.journal)
        self.unsent: list[StepPoint | EvaluationPoint] = []
        self.system = SystemReader(run.system, self.state.system_bytes)
        self.unsent_readings: list[tuple[str, int, SystemReading]] = []
        self.progress = Progress()
        self.curves = Curves()
        self.described = ""
        """The run's description as MLflow has it."""
        self.described_at = 0.0
        self.rate: float | None = None
        """The learning rate that MLflow was told last."""
        self.has_begun = False
        self.client: Client
        """MLflow, once the upload has begun: importing it takes long."""
        self._uri = uri

    def save(self, **changes: Any) -> None:
        """Remember how far the upload has come."""
        self.state = self.state.model_copy(update=changes)
        self.state.write(self.run.recorded)

    def begin(self) -> None:
        """Create the run, once, with its params, tags and spec; or resume it."""
        if self.has_begun:
            return
        self.client = Client(self._uri)
        launcher = self.record.launcher.id
        if not self.state.run_id:
            experiment_id = self.client.experiment_id(self.record.experiment)
            run_id = self.client.find_run(experiment_id, self.record.token)
            uploaded = self._take_over(run_id) if run_id else {}
            run_id = run_id or self.client.create_run(
                experiment_id, self.record.name, self.record.tags
            )
            self.save(
                run_id=run_id, experiment_id=experiment_id, uploaded=uploaded, launcher=launcher
            )
        elif self.state.launcher != launcher:  # it is resumed
            if self.client.launcher(self.state.run_id) not in (self.state.launcher, launcher):
                self.save(uploaded=self._take_over(self.state.run_id))
            self.client.take_over(self.state.run_id, launcher)
            self._add_ray_job()
            self.save(launcher=launcher, reported=False)
        if not self.state.begun:
            self.client.log_params(self.state.run_id, self.record.params)
            self.client.log_text(self.state.run_id, self.record.spec, "spec.yaml")
            self.client.log_data(self.state.run_id, self.record.data)
            self.client.choose_primary_metric(
                self.state.experiment_id, self.record.primary_metric, self.record.is_lower_better
            )
            self.save(begun=True)
        self.has_begun = True

    def _add_ray_job(self) -> None:
        """Let the run name the Ray job that resumes it, beside those before."""
        if job := self.record.tags.get(RAY_JOB):
            before = self.client.tag(self.state.run_id, RAY_JOBS) or self.client.tag(
                self.state.run_id, RAY_JOB
            )
            known = [one for one in before.split(", ") if one not in ("", job)]
            tags = {RAY_JOB: job, RAY_JOBS: ", ".join([*known, job])}
            self.client.set_tags(self.state.run_id, tags)

    def _take_over(self, run_id: str) -> dict[str, int]:
        """Take the run from another machine; how far that has uploaded it."""
        self.client.take_over(run_id, self.record.launcher.id)
        time.sleep(SETTLE_SECONDS)
        return self.client.uploaded(run_id)

    def _refuse_superseded(self) -> None:
        """Raise SupersededError if another machine has resumed the run, as its backup allows."""
        if not self.record.is_copied:
            return
        if self.client.launcher(self.state.run_id) != self.record.launcher.id:
            raise SupersededError("another command has resumed this run, and records it")

    def read(self) -> None:
        """Take in what the journal holds by now."""
        points = list(self.reader.new())
        self.progress = self.progress.after(points)
        self.curves.add(points)
        self.unsent += [point for point in points if "event" not in point]

    def draw(self) -> None:
        """Let the report of what was read be drawn, unless MLflow has it."""
        if not self.state.reported:
            self.drawing.begin(self.run, self.record.name, self.curves)

    def send_points(self) -> None:
        """Send what was read of the journal and MLflow does not have."""
        uploaded = self.state.uploaded
        self.unsent = [
            point for point in self.unsent if point["step"] > uploaded.get(_kind(point), -1)
        ]
        while self.unsent:
            metrics: list[Value] = []
            num_points, rate = 0, self.rate
            uploaded = dict(self.state.uploaded)
            for point in self.unsent:
                new = list(values_of(_without_rate(point, rate)))
                if metrics and len(metrics) + len(new) > BATCH:
                    break
                metrics += new
                num_points += 1
                uploaded[_kind(point)] = point["step"]
                rate = point["train"]["learning_rate"] if "train" in point else rate
            self._refuse_superseded()
            self.client.log_metrics(self.state.run_id, metrics)
            del self.unsent[:num_points]
            self.rate = rate
            self.save(uploaded=uploaded)

    def send_system(self) -> None:
        """Send readings of the machines' load that MLflow does not have."""
        self.unsent_readings += self.system.new()
        while self.unsent_readings:
            batch = self.unsent_readings[:READINGS]
            self._refuse_superseded()
            metrics = [value for *_, reading in batch for value in values_of_reading(reading)]
            self.client.log_metrics(self.state.run_id, metrics)
            ends = {name: end for name, end, _ in batch}
            del self.unsent_readings[:READINGS]
            self.save(system_bytes=self.state.system_bytes | ends)

    def describe(self, ended: Ended | None = None) -> None:
        """Bring the run's description up to date, now and then while it trains."""
        now = time.monotonic()
        if ended is None and now - self.described_at < DESCRIBE_SECONDS:
            return
        self.described_at = now
        proof = self.client.find_proof(self.state.experiment_id, self.record.tags)
        done = self.run.read_done() if ended else None
        text = describe(self.record, self.progress, self.state, ended, proof, done)
        if text != self.described:
            self.client.set_tags(self.state.run_id, {NOTE: text})
            self.described = text

    def finish(self, ended: Ended) -> None:
        """The rest of the curve, the model of a finished run, and the run's status."""
        self.send_points()
        self._refuse_superseded()
        run_id = self.state.run_id
        tags = _tags(self.progress.starts)
        if ended.state == "finished":
            done = Done.read(self.run.done)
            if not self.state.model_uri:
                self._log_model(done)
            step = done.best.step if done.best else done.steps
            metrics = [
                value
                for group, scores in (("best", done.best), ("test", done.test))
                if scores
                for value in values(group, scores.metrics, done.time, step)
            ]
            metrics += values("decision", done.decision, done.time, step)
            self.client.log_model_metrics(run_id, self.state.model_id, metrics, self.record.data)
            if done.first_difference is not None:
                tags["pipeline.first_difference"] = str(done.first_difference)
        if ended.state != "killed" and not self.state.reported:
            self.draw()
            self.client.log_files(run_id, self.drawing.files())
            self.save(reported=True)
        if ended.reason:
            tags[ERROR] = ended.reason
        if self.progress.notes:
            tags[WARNING] = "; ".join(self.progress.notes)
        self.client.set_tags(run_id, tags)
        environment = {"versions": self.record.versions, "bits": _bits(self.progress.starts)}
        self.client.log_dict(run_id, environment, "environment.json")
        self.send_system()
        self.describe(ended)
        for path in (self.run.nonfinite, *self.run.tracebacks):
            if path.exists():
                self.client.log_file(run_id, path)
        self.client.end_run(run_id, ended.state)
        self.save(complete=True, error="")

    def _log_model(self, done: Done) -> None:
        """The model, its link to the run, and beside it the metrics of the step it is of.

        It is created once, and noted: another try continues with it.
        """
        from pipeline.tracking.card import card  # both take a second to import
        from pipeline.tracking.model import log_model

        run_id, step = self.state.run_id, done.best.step if done.best else done.steps
        if not self.state.model_id:
            self.save(model_id=self.client.create_model(run_id))
        uri, outputs = log_model(self.run, self.state.model_id, self.record)
        self.client.link_model(run_id, self.state.model_id, step)
        points = points_at(self.run.journal, step)
        metrics = [one for point in points for one in values_of(point) if not is_of_system(one)]
        self.client.log_model_metrics(run_id, self.state.model_id, metrics, self.record.data)
        final = done.best.metrics if done.best else last_values(self.curves)
        validation = Scores(metrics=final, baselines=self.curves.baselines)
        text = card(self.record, step, {"validation": validation, "test": done.test}, outputs)
        self.client.describe_model(self.state.model_id, text)
        registered = ""
        if self.record.register_as:
            metric = self.record.primary_metric.partition("/")[2]
            candidate = Candidate(
                self.record.register_as,
                metric,
                final.get(metric),
                self.record.is_lower_better,
                self.record.data.digests.get("validation", ""),
            )
            registered = self.client.register(run_id, self.state.model_id, text, candidate)
        self.save(model_uri=uri, registered=registered)


def _without_rate(
    point: StepPoint | EvaluationPoint, rate: float | None
) -> StepPoint | EvaluationPoint:
    """The point without a learning rate that is still `rate`: MLflow costs 0.1 ms a value.

    With the speed it is told all the same, every second or so.
    """
    if "validation" in point or "throughput" in point:
        return point
    if point["train"]["learning_rate"] != rate:
        return point
    train = {name: value for name, value in point["train"].items() if name != "learning_rate"}
    return {**point, "train": train}


def _kind(point: StepPoint | EvaluationPoint) -> str:
    return "train" if "train" in point else "validation"


def _bits(starts: Sequence[Start]) -> list[dict[str, Any]]:
    """What the curve's bits depended on, and after which step from."""
    parts: list[dict[str, Any]] = []
    for start in starts:
        if not parts or start["bits"] != parts[-1]["bits"]:
            parts.append({"after_step": start["step"], "bits": start["bits"]})
    return parts


def _tags(starts: Sequence[Start]) -> dict[str, str]:
    """How many workers each attempt had, and the hash of what bits depend on, if it changed."""
    if not starts:
        return {}
    tags = {"pipeline.workers": ", ".join(str(start["workers"]) for start in starts)}
    if len(parts := _bits(starts)) > 1:
        tags["pipeline.bits_sha256"] = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return tags
