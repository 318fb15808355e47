"""What a run gives back: to `pipeline.run` in Python, and as `--json`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import RunError, UnrecordedError

if TYPE_CHECKING:
    from pipeline.rundir import RunDir
    from pipeline.rundir.curve_end import CurveEnd
    from pipeline.rundir.records import Done, Point, Recorded


@dataclass(frozen=True)
class Result:
    """A finished run."""

    run_id: str
    tracking_uri: str
    storage: str
    """Folder of the run: spec, journal of the curve, weights."""
    steps: int
    loss: float | None
    """Loss of the last step."""
    metrics: dict[str, float | None]
    """Values of the validation rows, `loss` and each metric, with the weights that are the model:
    the last ones, or those of the best evaluation."""
    baselines: dict[str, float | None]
    """The metrics that a constant prediction has."""
    test: dict[str, float | None]
    """Values of the test rows, with the recorded model."""
    test_baselines: dict[str, float | None]
    decision: dict[str, float | None]
    """With `training.threshold`: what was chosen, and the metric of the validation rows there."""
    notes: list[str]
    """What these numbers do not show."""
    curve_sha256: str
    weights_sha256: str
    """SHA-256 of the recorded model: the last step's weights, or those of the best evaluation."""
    best: dict[str, Any] | None = None
    """With `training.best_by`: metric, step and value of the best evaluation."""
    experiment_id: str = ""
    """MLflow's experiment, in which the run is."""
    state: str = "finished"
    workers: list[int] = field(default_factory=list)
    """How many workers it had: once, and again after each failure, resize or stop."""
    first_difference: int | None = None
    """The first step that gave other numbers when it was recomputed after a failure."""
    model_uri: str = ""
    """Address of the model, for `mlflow.pyfunc.load_model` and `mlflow models serve`."""
    registered: str = ""
    """With `tracking.register_as`: the version that the model became, and its aliases."""
    ended_early: str = ""
    """With `training.stop`: why there are fewer steps than the job has."""
    first_step_seconds: float | None = None
    """From the start of the command to the end of the first step."""

    @classmethod
    def of(cls, run: RunDir, recorded: Recorded, end: CurveEnd, started: float) -> Result:
        """The result in a run's folder, of a command that `started` at that time (since 1970).

        Raises RunError without one, and UnrecordedError, which holds it, if MLflow lacks a part.
        """
        from pipeline.rundir.records import Done

        try:
            done = Done.read(run.done)
        except (OSError, ValueError):
            raise RunError(f"the workers ended without a result in {run.path}") from None
        first = end.first_new
        evaluated = done.best.step if done.best else end.evaluated
        result = cls(
            run_id=recorded.run_id,
            tracking_uri=recorded.tracking_uri,
            experiment_id=recorded.experiment_id,
            storage=str(run.path),
            steps=done.steps,
            loss=end.loss,
            metrics=done.best.metrics if done.best else end.metrics,
            baselines=end.baselines,
            test=done.test.metrics if done.test else {},
            test_baselines=done.test.baselines if done.test else {},
            decision=done.decision,
            notes=[*end.notes.get(evaluated, []), *_overfitting(end, done)],
            curve_sha256=end.sha256,
            weights_sha256=done.weights_sha256,
            best=done.best.model_dump() if done.best else None,
            state="finished" if recorded.complete else "unrecorded",
            workers=done.workers,
            first_difference=done.first_difference,
            ended_early=done.ended_early,
            first_step_seconds=None if first is None else round(first - started, 3),
            model_uri=recorded.model_uri,
            registered=recorded.registered,
        )
        if not recorded.complete:
            raise UnrecordedError(result, recorded.error or "the upload to MLflow was cut off")
        return result

    @cached_property
    def model(self) -> Any:
        """The recorded model: `model.predict(data_frame)` takes raw columns."""
        from pipeline.tracking.model import load_model

        return load_model(self.run_id, self.tracking_uri)

    @cached_property
    def curve(self) -> Sequence[Point]:
        """Every point of the journal: `step` with `train` and `terms`, or with `validation`.

        Read from the run's folder when it is first asked for.
        """
        from pipeline.rundir import RunDir
        from pipeline.rundir.journal import Reader

        return list(Reader(RunDir(Path(self.storage)).journal).new())

    @property
    def losses(self) -> list[float | None]:
        """The global loss of every step."""
        return [point["train"]["loss"] for point in self.curve if "train" in point]

    def summary(self) -> dict[str, Any]:
        """What `--json` prints."""
        keys = (
            "run_id",
            "tracking_uri",
            "state",
            "steps",
            "loss",
            "metrics",
            "baselines",
            "test",
            "test_baselines",
            "decision",
            "curve_sha256",
            "weights_sha256",
            "best",
            "storage",
            "workers",
            "first_difference",
            "ended_early",
            "model_uri",
            "registered",
            "first_step_seconds",
        )
        return {key: getattr(self, key) for key in keys}


def _overfitting(end: CurveEnd, done: Done) -> list[str]:
    """That other weights than the model's were better, where nobody has chosen."""
    if done.best is not None or not end.overfitting:
        return []
    return [f"{end.overfitting}; training.best_by keeps the best weights"]
