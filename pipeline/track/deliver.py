"""Deliver one run's journal, params and model to MLflow: `python -m pipeline.track.deliver FOLDER`.

Runs beside training, from a high-water mark kept in the run's folder, and can be run again: a
point that MLflow has already is dropped there, since its time was fixed when it was first written.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.redact import redacted
from pipeline.track.delivery import ALONE, mlflow_key, recorded, with_password
from pipeline.train import files
from pipeline.train.curve import Reader
from pipeline.train.files import write_json

LONGEST_TEXT = 60_000  # MLflow's limit of a data set's source and schema
BATCH = 1000  # MLflow's limit of metrics in one request
EVERY_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0  # between tries at a server that does not answer
PATIENCE_SECONDS = 30.0
"""After training's end, for a server that does not answer; PIPELINE_DELIVERY_PATIENCE_SECONDS."""
KILLED_PATIENCE_SECONDS = 5.0
"""The most after a signal: whoever sent it does not wait for long."""
QUIET_SECONDS = 10.0  # without a new point, after which a run without its launcher has ended
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the default blocks for minutes; we retry ourselves
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}
KINDS = ("train", "validation")
"""Points of the journal that have metrics; how far each was delivered is kept."""
SQLITE = "sqlite:///"
SETTLE_SECONDS = 2.0
LAUNCHER = "pipeline.launcher"
"""Tag of a run: id of the command that records it."""
ERROR = "pipeline.error"
"""Tag of a failed run: why it failed."""
WARNING = "pipeline.warning"
"""Tag of a run that ended well, and whose model is hardly of use: why."""
STATUS = {"finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}


class SupersededError(Exception):
    """Another command goes on with the run, from its copy, and records it."""


class Delivery:
    """One run on its way to MLflow; the folder's `recorded.json` holds how far it has come."""

    def __init__(self, folder: Path) -> None:
        import mlflow

        self.folder = folder
        self.record = files.read_json(folder / files.RECORD)
        self.launcher = self.record["launcher"]["id"]
        before = recorded(folder) if (folder / files.RECORDED).exists() else {}
        self.state: dict[str, Any] = {"delivered": {}, **before, "complete": False}
        if "run_id" in self.state:
            uri = with_password(self.state["tracking_uri"])
        else:  # nothing is there yet: a server may have moved
            uri = with_password(self.record["tracking_uri"])
            uri = os.environ.get("MLFLOW_TRACKING_URI", uri)
        self.state["tracking_uri"] = redacted(uri)
        self.state.pop("error", None)
        self.reader = Reader(folder / files.CURVE)
        self.unsent: list[dict[str, Any]] = []
        self.starts: list[dict[str, Any]] = []
        self.said: list[str] = []
        """Of the last evaluation."""
        self.rate: float | None = None
        self.has_begun = False
        if uri.startswith(SQLITE):
            _make_database(Path(uri.removeprefix(SQLITE)))
        mlflow.set_tracking_uri(uri)
        self.client = mlflow.MlflowClient()

    def save(self, **changes: Any) -> None:
        """Remember how far the delivery has come."""
        self.state.update(changes)
        write_json(self.folder / files.RECORDED, self.state)

    def begin(self) -> None:
        """Make the run, once, with its params, tags and spec; or go on with it."""
        from mlflow.entities import Param

        if self.has_begun:
            return
        if "run_id" not in self.state:
            tags = {key: value[:5000] for key, value in self.record["tags"].items()}
            experiment = experiment_id(self.client, self.record["experiment"])
            run = self._made_before(experiment)
            delivered = self._taken_over(run) if run else {}
            run = run or self.client.create_run(experiment, run_name=self.record["name"], tags=tags)
            self.save(
                run_id=run.info.run_id, experiment_id=run.info.experiment_id,
                delivered=delivered, launcher=self.launcher,
            )  # fmt: skip
        elif self.state.get("launcher") != self.launcher:  # it goes on
            run = self.client.get_run(self.state["run_id"])
            if run.data.tags.get(LAUNCHER) not in (self.state.get("launcher"), self.launcher):
                self.save(delivered=self._taken_over(run))
            self._take(run.info.run_id)
            self.save(launcher=self.launcher)
        if not self.state.get("begun"):
            known = self.client.get_run(self.state["run_id"]).data.params  # of an earlier machine
            params = [
                Param(key, value[:6000])
                for key, value in self.record["params"].items()
                if key not in known
            ]
            for start in range(0, len(params), 100):
                self.client.log_batch(self.state["run_id"], params=params[start : start + 100])
            self.client.log_text(self.state["run_id"], self.record["spec"], "spec.yaml")
            self._data_sets()
            self.save(begun=True)
        self.has_begun = True

    def _take(self, run_id: str) -> None:
        """The run goes on, and this command is the one that records it."""
        self.client.set_tag(run_id, LAUNCHER, self.launcher)
        if ERROR in self.client.get_run(run_id).data.tags:  # of the time before
            self.client.delete_tag(run_id, ERROR)
        self.client.update_run(run_id, status="RUNNING")

    def _taken_over(self, run: Any) -> dict[str, int]:
        """Take the run from another machine; how far that has delivered it."""
        self._take(run.info.run_id)
        time.sleep(SETTLE_SECONDS)  # what it is sending arrives
        return self._delivered_before(run.info.run_id)

    def _look(self) -> None:
        """Raise SupersededError if another machine goes on with the run; two could by its copy."""
        if self.record["is_copied"]:
            tags = self.client.get_run(self.state["run_id"]).data.tags
            if tags.get(LAUNCHER) != self.launcher:
                raise SupersededError("another command goes on with this run, and records it")

    def _made_before(self, experiment: str) -> Any:
        """The run, if the answer to its making, or what was noted of it, got lost."""
        token = self.record["tags"]["pipeline.run"]
        found = self.client.search_runs([experiment], f"tags.`pipeline.run` = '{token}'")
        return found[0] if found else None

    def _delivered_before(self, run_id: str) -> dict[str, int]:
        """How far the run's record has come, as MLflow has it.

        Steps that another machine delivered and that are computed again have another time here.
        """
        found: dict[str, int] = {}
        for key in self.client.get_run(run_id).data.metrics:
            kind = key.partition("/")[0]
            steps = [m.step for m in self.client.get_metric_history(run_id, key)]
            found[kind] = max(found.get(kind, -1), *steps)
        return found

    def _data_sets(self) -> None:
        """The rows as input of the run."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        data = self.record["data"]
        profile = data["profile"]
        short = {"num_rows": profile["rows"], "dropped": profile["dropped"],
                 "fingerprint": profile["fingerprint"]}  # fmt: skip
        described = [
            {"name": name, "type": f"{column['kind']} ({column['type']})", "required": True}
            for name, column in data["columns"].items()
        ]
        texts = [json.dumps(data["source"]), json.dumps({"mlflow_colspec": described})]
        source, schema = (text if len(text) <= LONGEST_TEXT else "{}" for text in texts)
        made = Dataset(
            name=data["name"][:500], digest=data["digest"], source_type="files",
            source=source, schema=schema, profile=json.dumps(short),
        )  # fmt: skip
        given = DatasetInput(made, [InputTag("mlflow.data.context", "training")])
        self.client.log_inputs(self.state["run_id"], datasets=[given])
        self.client.log_dict(self.state["run_id"], data, "data.json")

    def points(self) -> None:
        """Send what the journal holds by now and MLflow does not."""
        for point in self.reader.new():
            if point.get("event") == "start":
                self.starts.append(point)
            if "validation" in point:
                self.said = point.get("said", [])
            for kind in KINDS:
                if kind in point and point["step"] > self.state["delivered"].get(kind, -1):
                    self.unsent.append(point)
        while self.unsent:
            metrics: list[Any] = []
            num_points = 0
            delivered = dict(self.state["delivered"])
            for point in self.unsent:
                made = list(_metrics(self._news(point)))
                if metrics and len(metrics) + len(made) > BATCH:
                    break
                metrics += made
                num_points += 1
                delivered["train" if "train" in point else "validation"] = point["step"]
            self._look()
            self.client.log_batch(self.state["run_id"], metrics=metrics)
            del self.unsent[:num_points]
            self.save(delivered=delivered)

    def _news(self, point: dict[str, Any]) -> dict[str, Any]:
        """The point without a learning rate that is the last one's: MLflow costs 0.1 ms a value."""
        rate = point.get("train", {}).get("learning_rate")
        if rate is None or rate != self.rate or "rows_per_second" in point["train"]:
            self.rate = rate or self.rate
            return point
        kept = {name: value for name, value in point["train"].items() if name != "learning_rate"}
        return {**point, "train": kept}

    def finish(self, state: str, reason: str = "") -> None:
        """The rest of the curve, the model of a finished run, and the run's status."""
        self.points()
        self._look()
        if state == "finished" and not self.state.get("model_uri"):
            done = files.read_json(self.folder / files.DONE)
            self._model(done["best"]["step"] if done["best"] else done["steps"])
            if best := done["best"]:
                at = {"time": done["time"], "step": best["step"]}
                metrics = list(_metrics({"best": best["metrics"], **at}))
                self.client.log_batch(self.state["run_id"], metrics=metrics)
            if done["first_difference"] is not None:
                step = done["first_difference"]
                self.client.set_tag(self.state["run_id"], "pipeline.first_difference", step)
        tags = _tags(self.starts) | ({ERROR: reason} if reason else {})
        if self.said:
            tags[WARNING] = "; ".join(self.said)
        for key, value in tags.items():
            self.client.set_tag(self.state["run_id"], key, value[:5000])
        for path in sorted(
            [*self.folder.glob(files.NONFINITE), *self.folder.glob(files.TRACEBACKS)]
        ):
            self.client.log_artifact(self.state["run_id"], str(path))
        self.client.set_terminated(self.state["run_id"], STATUS[state])
        self.state.pop("error", None)  # of an earlier try
        self.save(complete=True)

    def _model(self, step: int) -> None:
        """The model, its link to the run, and beside it the metrics of the step it is of.

        It is made once, and noted: another try goes on with it.
        """
        from mlflow.entities import LoggedModelOutput, Metric

        from pipeline.track.model import log_model

        run_id = self.state["run_id"]
        run = self.client.get_run(run_id)
        if "model_id" not in self.state:
            experiment_id, of_run = run.info.experiment_id, f"source_run_id = '{run_id}'"
            made = self.client.search_logged_models([experiment_id], of_run)
            made = made or [
                self.client.create_logged_model(
                    experiment_id, "model", source_run_id=run_id, params=run.data.params
                )
            ]
            self.save(model_id=made[0].model_id)
        model_id = self.state["model_id"]
        uri = log_model(self.folder, model_id, self.record)
        linked = run.outputs.model_outputs if run.outputs else []
        if model_id not in [output.model_id for output in linked]:  # a second link is refused
            self.client.log_outputs(run_id, [LoggedModelOutput(model_id, step=step)])
        points = [
            point for point in Reader(self.folder / files.CURVE).new() if point["step"] == step
        ]
        metrics = [
            Metric(m.key, m.value, m.timestamp, m.step, model_id=model_id, run_id=run_id)
            for point in points
            for m in _metrics(point)
        ]
        self.client.log_batch(run_id, metrics=metrics)
        self.save(model_uri=uri)


def _tags(starts: list[dict[str, Any]]) -> dict[str, str]:
    """How many workers each attempt had, and what the curve's bits depended on from where."""
    if not starts:
        return {}
    tags = {"pipeline.workers": ", ".join(str(start["workers"]) for start in starts)}
    parts: list[dict[str, Any]] = []
    for start in starts:
        if not parts or start["bits"] != parts[-1]["bits"]:
            parts.append({"after_step": start["step"], "bits": start["bits"]})
    if len(parts) > 1:
        text = json.dumps(parts)
        tags |= {
            "pipeline.bits": text,
            "pipeline.bits_sha256": hashlib.sha256(text.encode()).hexdigest(),
        }
    return tags


def _make_database(path: Path) -> None:
    """Let MLflow make its tables beside the place: half of them could never be mended."""
    import mlflow

    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return
        aside = path.with_name(f".{path.name}.new")
        for left in path.parent.glob(f"{aside.name}*"):  # by one that was killed
            left.unlink()
        mlflow.MlflowClient(f"{SQLITE}{aside}").search_experiments(max_results=1)
        aside.replace(path)


def experiment_id(client: Any, name: str) -> str:
    """Id of the experiment of that name, made or restored where need be."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        # a server knows where artifacts go; without one they stand beside the database
        place = None
        if client.tracking_uri.startswith(SQLITE):
            beside = Path(client.tracking_uri.removeprefix(SQLITE)).resolve().parent
            place = (beside / "mlflow-artifacts").as_uri()
        try:
            return str(client.create_experiment(name, artifact_location=place))
        except MlflowException:  # another run made it at the same moment
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    elif found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def _metrics(point: dict[str, Any]) -> Iterator[Any]:
    from mlflow.entities import Metric

    terms = point.get("terms", {})
    groups = {
        "train": point.get("train", {}) | ({"skipped": 1.0} if "skipped" in point else {}),
        "train/loss": terms if len(terms) > 1 else {},
        "validation": point.get("validation", {}),
        "best": point.get("best", {}),
    }
    for group, values in groups.items():
        for name, value in values.items():
            if value is not None:
                key = mlflow_key(f"{group}/{name}")
                yield Metric(key, float(value), point["time"], point["step"])


def main(folder: Path, is_alone: bool = False) -> int:
    """Deliver until training has ended; 0 when the record is complete.

    Signals do not end it: `ray job stop` sends them to all processes, and the command that trains
    says when to end. `is_alone` says that there is no such command any more.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    _step_back()
    launcher = files.read_json(folder / files.RECORD)["launcher"]
    with (folder / ".delivering").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # an earlier launcher's delivery ends first
        return _deliver(folder, launcher, is_alone)


def _deliver(folder: Path, launcher: dict[str, Any], is_alone: bool) -> int:
    """Deliver as long as `launcher` has not handed the run over to another one."""
    while _starting(folder) and not _ended(folder, is_alone):
        time.sleep(0.1)
    delivery: Delivery | None = None
    deadline, pause, printed = float("inf"), EVERY_SECONDS, ""
    while True:
        if files.read_json(folder / files.RECORD)["launcher"] != launcher:
            return 0  # another command goes on with the run, and delivers it
        ended = _ended(folder, is_alone)
        if ended and deadline == float("inf"):
            deadline = time.monotonic() + _patience(ended[0] == "killed" and not is_alone)
        try:
            delivery = delivery or Delivery(folder)
            delivery.begin()
            if ended:
                delivery.finish(*ended)
                return 0
            delivery.points()
            if delivery.state.pop("error", None):
                delivery.save()
            pause = EVERY_SECONDS
        except SupersededError as error:
            assert delivery is not None
            delivery.save(error=str(error))
            return 0
        except Exception as error:  # whatever a server or disk does, training is not to feel it
            reason = _reason(error, delivery)
            if reason != printed:
                print(redacted(traceback.format_exc(), _given()), file=sys.stderr, flush=True)
            printed = reason
            said = {"complete": False, "error": reason[:500]}
            if delivery is not None:
                delivery.save(**said)
            elif not (folder / files.RECORDED).exists():
                write_json(folder / files.RECORDED, said)
            if time.monotonic() > deadline:
                return 3
            pause = EVERY_SECONDS if ended else min(2 * pause, LONGEST_PAUSE_SECONDS)
        _pause(folder, pause)


def _given() -> str:
    """The environment's address of MLflow, which may hold a password."""
    return os.environ.get("MLFLOW_TRACKING_URI", "")


def _patience(is_short: bool) -> float:
    """Seconds that an ended run's record may take where MLflow cannot be told."""
    given = os.environ.get("PIPELINE_DELIVERY_PATIENCE_SECONDS", PATIENCE_SECONDS)
    return min(float(given), KILLED_PATIENCE_SECONDS if is_short else math.inf)


def _reason(error: Exception, delivery: Delivery | None) -> str:
    """What keeps MLflow from being told, where, and whether another server could be told."""
    reason = redacted(str(error).partition("\n")[0] or type(error).__name__, _given())
    reason = " ".join(reason.split())
    if "Max retries exceeded" in reason or "Connection aborted" in reason:
        reason = "MLflow's server does not answer"
    if delivery is None:
        return reason
    other = "" if "run_id" in delivery.state else "; MLFLOW_TRACKING_URI can name another"
    return f"{reason} ({delivery.state['tracking_uri']}{other})"


def _step_back() -> None:
    """Training comes first: this process takes the time that is left."""
    os.nice(19)
    if hasattr(os, "SCHED_IDLE"):  # Linux: woken workers need not wait for their turn
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def _starting(folder: Path) -> bool:
    """Whether several workers are still starting: importing MLflow now would hold them up."""
    record = files.read_json(folder / files.RECORD)
    return record["num_workers"] > 1 and not (folder / files.CURVE).exists()


def _pause(folder: Path, seconds: float) -> None:
    """Until the next delivery, or shorter when training ends meanwhile."""
    until, already = time.monotonic() + seconds, (folder / files.ENDED).exists()
    while time.monotonic() < until and ((folder / files.ENDED).exists() == already):
        time.sleep(0.02)


def _ended(folder: Path, is_alone: bool) -> tuple[str, str] | None:
    """How training ended and why, or None while it goes on."""
    try:
        said = files.read_json(folder / files.ENDED)
        is_done = said["state"] != "finished" and files.is_done(folder)  # after it was stopped
        return ("finished", "") if is_done else (said["state"], said.get("reason", ""))
    except FileNotFoundError:
        pass
    launcher = files.read_json(folder / files.RECORD)["launcher"]
    if not is_alone and os.getppid() == launcher["pid"]:
        return None
    if files.is_done(folder):
        return "finished", ""
    journal = folder / files.CURVE  # workers may outlive the launcher for a moment
    quiet = time.time() - journal.stat().st_mtime if journal.exists() else QUIET_SECONDS
    return ("failed", "the command was killed") if quiet >= QUIET_SECONDS else None


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), ALONE in sys.argv[2:]))
