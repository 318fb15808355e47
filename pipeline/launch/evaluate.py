"""Evaluate a trained model on files, and record that with the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import plugins
from pipeline.errors import RecordError
from pipeline.launch.run import Tell, threads
from pipeline.launch.trained import load_trained

if TYPE_CHECKING:
    from pipeline.inference.evaluate import FileScores
    from pipeline.inference.model import TrainedModel


@dataclass(frozen=True)
class Evaluated:
    """What `evaluate` found."""

    num_rows: int
    num_dropped: int
    """Rows that `data.missing` drops."""
    digest: str
    """SHA-256 of the rows, as runs have it of their splits."""
    metrics: dict[str, float | None]
    baselines: dict[str, float | None]
    """The metrics that a constant prediction has."""
    notes: list[str]
    page: str
    """The report with its pictures, as one HTML file."""
    run_id: str
    """The run that holds it in MLflow, below the one that trained the model; empty if none does."""
    tracking_uri: str
    unrecorded: str
    """Why MLflow does not have it; empty if it does, or was not to be told."""

    def summary(self) -> dict[str, Any]:
        """What `--json` prints."""
        keys = ("num_rows", "num_dropped", "digest", "metrics", "baselines", "notes")
        state = "unrecorded" if self.unrecorded else "done"
        where = {"run_id": self.run_id, "tracking_uri": self.tracking_uri}
        return {"state": state, **{key: getattr(self, key) for key in keys}, **where}


def evaluate(
    model: str,
    files: Sequence[str],
    *,
    storage: str | Path = "runs",
    imports: Sequence[str] = (),
    record: bool = True,
    live: Tell = lambda _: None,
) -> Evaluated:
    """Losses and metrics of a trained model on all rows of the `files`.

    They are those that a run has of its test rows. `model` is the folder of a finished run, its
    name in `storage`, or MLflow's address of a model that a run recorded. With `record` MLflow gets
    them as metrics of the model. Raises UsageError and DataError.
    """
    from pipeline.inference.evaluate import evaluate_files

    plugins.load(list(imports))
    trained, home = load_trained(model, Path(storage))
    num_rows = 0

    def report(rows: int) -> None:
        nonlocal num_rows
        num_rows += rows
        live(f"read  {num_rows:,} rows")

    with threads(trained.job.workers.threads):  # as in training
        scores = evaluate_files(trained, files, Path.cwd(), report)
    page = _page(model, trained, scores)
    run_id = unrecorded = ""
    if record and home.model_id:
        from pipeline.tracking.evaluations import record_evaluation

        facts = {
            "model": model,
            "files": scores.files,
            "metrics": scores.metrics,
            "baselines": scores.baselines,
        }
        name = f"evaluate-{trained.job.name}"
        try:
            run_id = record_evaluation(
                home.tracking_uri, home.model_id, name, _data(trained, scores),
                scores.metrics, facts, page,
            )  # fmt: skip
        except RecordError as error:
            unrecorded = str(error)
    elif record:
        unrecorded = "MLflow does not have this model"
    return Evaluated(
        scores.num_rows, scores.num_dropped, scores.digest, dict(scores.metrics),
        dict(scores.baselines), scores.notes, page, run_id, home.tracking_uri, unrecorded,
    )  # fmt: skip


def _page(model: str, trained: TrainedModel, scores: FileScores) -> str:
    """The report of an evaluation."""
    from pipeline.report.build import Report, of_predictions
    from pipeline.report.facts import verdict
    from pipeline.report.page import html

    report = of_predictions(scores.held_out) if scores.held_out else Report([], [])
    more = f" and {len(scores.files) - 1} more" if len(scores.files) > 1 else ""
    facts = {
        "model": f"{model} ({trained.job.model.name})",
        "rows": f"{scores.num_rows:,} of {scores.files[0]}{more}",
        "test": verdict(scores.metrics, scores.baselines),
    }
    pictured = Report(report.exhibits, [*scores.notes, *report.notes])
    return html(f"{trained.job.name}, evaluated", facts, pictured)


def _data(trained: TrainedModel, scores: FileScores) -> Any:
    """The rows as MLflow is told of them."""
    from pipeline.rundir.records import DataFacts
    from pipeline.tracking.record import column_facts

    return DataFacts(
        name=trained.job.name,
        fingerprint=scores.digest,
        files=scores.files[:1000],
        num_files=len(scores.files),
        rows={"test": scores.num_rows},
        digests={"test": scores.digest},
        dropped=scores.num_dropped,
        columns=column_facts(trained.fields),
        profile={},
    )
