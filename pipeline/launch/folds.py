"""Cross-validation: a job trained several times, each time with another fold held out."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import plugins
from pipeline.errors import DataError, RecordError, UnrecordedError, UsageError
from pipeline.launch.result import Result
from pipeline.launch.run import Tell, base_of, run
from pipeline.spec import JobSpec, load
from pipeline.spec.split import Split


@dataclass(frozen=True)
class Folds:
    """What the runs of all folds found."""

    name: str
    results: list[Result]
    """By fold."""
    tracking_uri: str
    run_id: str = ""
    """MLflow's run above them, with means and deviations; empty if there is none."""
    unrecorded: str = ""
    """Why MLflow does not have all of it; empty if it does."""

    @property
    def scores(self) -> dict[str, list[float | None]]:
        """Each value of the validation rows, and of the test rows, by fold: of the weights that
        became the model. Thresholds, and what is gained by them, are `decision/...`."""
        each = [
            {f"validation/{name}": value for name, value in result.metrics.items()}
            | {f"decision/{name}": value for name, value in result.decision.items()}
            | {f"test/{name}": value for name, value in result.test.items()}
            for result in self.results
        ]
        return {name: [values.get(name) for values in each] for name in each[0]}

    @property
    def means(self) -> dict[str, float | None]:
        """Mean over the folds of each score; None where one has no value."""
        return {
            name: statistics.fmean(v for v in values if v is not None) if _whole(values) else None
            for name, values in self.scores.items()
        }

    @property
    def deviations(self) -> dict[str, float | None]:
        """Standard deviation over the folds, of a sample."""
        return {
            name: statistics.stdev(v for v in values if v is not None) if _whole(values) else None
            for name, values in self.scores.items()
        }

    def summary(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "state": "unrecorded" if self.unrecorded else "finished",
            "run_id": self.run_id,
            "tracking_uri": self.tracking_uri,
            "means": self.means,
            "deviations": self.deviations,
            "folds": [result.summary() for result in self.results],
        }


def run_folds(
    path: str | Path | Mapping[str, Any],
    num_folds: int,
    overrides: Mapping[str, Any] | None = None,
    imports: Sequence[str] = (),
    *,
    fresh: bool = False,
    say: Tell = lambda _: None,
    live: Tell = lambda _: None,
    started: float | None = None,
) -> Folds:
    """Train the job once for each fold, whose rows are held out for validation.

    Rows, or groups where the spec's validation names a `group`, are drawn into folds by what they
    hold; with `stratify`, each has the same share of each class. The same call again resumes:
    finished folds are left. Raises what `run` raises.
    """
    if not isinstance(num_folds, int) or num_folds < 2:
        raise UsageError(f"--folds: expected 2 or more, found {num_folds!r}")
    from pipeline.launch.signals import refuse_stopped, signals_raise
    from pipeline.train.job import prepare

    started = time.time() if started is None else started
    plugins.load(list(imports))
    spec = load(path, overrides)
    asked = _asked(spec)
    experiment = spec.tracking.experiment or spec.name
    if spec.tracking.register_as:
        say("note  the models of folds are not registered")
    results, problems = [], []
    changes_by_fold = {
        fold: {
            **(overrides or {}),
            "name": f"{spec.name[:80]}-fold-{fold}-of-{num_folds}",
            "data.validation": {**asked, "folds": num_folds, "fold": fold},
            "tracking.experiment": experiment,
            "tracking.register_as": None,
        }
        for fold in range(1, num_folds + 1)
    }
    for fold, changes in changes_by_fold.items():  # before any of them is trained
        try:
            prepare(load(path, changes), base_of(path), live)
        except DataError as error:
            raise DataError(f"fold {fold} of {num_folds}: {error}") from None
    with signals_raise():
        for fold, changes in changes_by_fold.items():
            refuse_stopped()
            say(f"fold  {fold} of {num_folds}")
            try:
                result = run(
                    path, changes, imports, fresh=fresh, say=say, live=live, started=started
                )
            except UnrecordedError as error:
                result = error.result
                problems.append(f"fold {fold}: {error}")
            results.append(result)
            started = None  # the time of a fold is its own
    folds = Folds(spec.name, results, results[0].tracking_uri)
    if problems:
        return replace(folds, unrecorded="; ".join(problems))
    return _recorded(folds, spec)


def _asked(spec: JobSpec) -> dict[str, Any]:
    """By which column the spec draws its validation rows."""
    validation = spec.data.validation
    if isinstance(validation, str | list):
        raise UsageError(
            "--folds: data.validation names files; folds are cut from the training rows"
        )
    if not isinstance(validation, Split):
        return {}
    if validation.time is not None:
        raise UsageError("--folds: data.validation splits by time, which has no folds")
    return {"group": validation.group, "stratify": validation.stratify}


def _recorded(folds: Folds, spec: JobSpec) -> Folds:
    """The folds, with MLflow's run above them."""
    from pipeline.tracking.folds import record_folds
    from pipeline.tracking.names import params

    num_folds = len(folds.results)
    try:
        run_id = record_folds(
            folds.tracking_uri,
            [result.run_id for result in folds.results],
            f"{folds.name}-folds-{num_folds}",
            {**params(spec), "folds": str(num_folds)},
            folds.scores,
            {**folds.means, **{f"{k}/deviation": v for k, v in folds.deviations.items()}},
        )
    except RecordError as error:
        return replace(folds, unrecorded=str(error))
    return replace(folds, run_id=run_id)


def _whole(values: Sequence[float | None]) -> bool:
    return all(value is not None and math.isfinite(value) for value in values)
