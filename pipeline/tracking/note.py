"""A run's description on its MLflow page: Markdown that is right whenever it is read."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from pipeline.report.facts import losses, verdict
from pipeline.rundir.records import Done, Ended, Numbers, Point, Record, Recorded, Start

FILES = "report.html", "spec.yaml", "data.json", "environment.json"
UNPROVED = "not proved yet (`pipeline prove --track`)"
CONTEXTS = {"train": "training", "validation": "validation", "test": "test"}
"""What MLflow calls the use of each split."""
STATES = {"finished": "Finished", "failed": "Failed", "killed": "Stopped"}


@dataclass(frozen=True)
class Progress:
    """How far a run has come, as its journal tells it."""

    step: int = 0
    time: int = 0
    """When, in milliseconds since 1970."""
    metrics: Numbers = field(default_factory=dict)
    """Of the last evaluation."""
    baselines: Numbers = field(default_factory=dict)
    starts: tuple[Start, ...] = ()
    notes: tuple[str, ...] = ()
    """Notes on the last evaluation."""

    def after(self, points: Iterable[Point]) -> Progress:
        """The progress once these points are read too."""
        now = self
        for point in points:
            if "event" in point:
                if point["event"] == "start":
                    now = replace(now, starts=(*now.starts, point))
                continue
            now = replace(now, step=max(now.step, point["step"]), time=point["time"])
            if "validation" in point:
                baselines = point.get("baselines", now.baselines)
                notes = tuple(point.get("notes", ()))
                now = replace(now, metrics=point["validation"], baselines=baselines, notes=notes)
        return now


@dataclass(frozen=True)
class ProofLink:
    """A run of `pipeline prove` for the same job and rows."""

    is_kept: bool
    run_id: str
    time: int
    """When it ended, in milliseconds since 1970."""

    def text(self, experiment_id: str) -> str:
        """Markdown: the verdict, linked, and its day."""
        verdict = "proved" if self.is_kept else "**broken**"
        return f"[{verdict}](#{_run(experiment_id, self.run_id)}) on {_date(self.time)[:10]}"


def describe(
    record: Record,
    progress: Progress,
    recorded: Recorded,
    ended: Ended | None = None,
    proof: ProofLink | None = None,
    done: Done | None = None,
) -> str:
    """What is trained on what, how it went, and how to do it again."""
    proved = proof.text(recorded.experiment_id) if proof else UNPROVED
    rows = [
        ("validation", verdict(progress.metrics, progress.baselines)),
        ("test", verdict(done.test.metrics, done.test.baselines) if done and done.test else ""),
        ("reproduce", _reproduce(record)),
        ("workers", _workers(progress.starts)),
        ("same curve on any cluster", proved),
        ("files", _links(recorded)),
    ]
    table = [f"| {name} | {text} |" for name, text in rows if text]
    primary = record.primary_metric.partition("/")[2]
    first = {primary: progress.metrics[primary]} if primary in progress.metrics else {}
    shown = verdict(first, progress.baselines)
    parts = [
        _subject(record),
        _state(record, progress, ended, done) + (f" Validation: **{shown}**." if shown else ""),
        *(f"**Note**: {note}." for note in progress.notes),
        "\n".join(["| | |", "|---|---|", *table]),
    ]
    return "\n\n".join(parts)


def with_proof(text: str, proof: ProofLink, experiment_id: str) -> str:
    """The description of a run whose job has been proved since."""
    return text.replace(UNPROVED, proof.text(experiment_id))


def _subject(record: Record) -> str:
    params, data = record.params, record.data
    more = f" and {data.num_files - 1} more" if data.num_files > 1 else ""
    counts = [f"{count:,} {CONTEXTS[split]}" for split, count in data.rows.items() if count]
    return (
        f"**{params['model.name']}** trained with **{' + '.join(losses(params))}** on "
        f"`{data.files[0] if data.files else data.name}`{more}: {', '.join(counts)} rows."
    )


def _state(record: Record, progress: Progress, ended: Ended | None, done: Done | None) -> str:
    step = f"step {progress.step:,} of {record.num_steps:,}"
    if ended is None:
        return f"**Training**: {step} at {_date(progress.time or int(1000 * time.time()))} UTC."
    if ended.state == "finished":
        early = f" of {record.num_steps:,}: {done.ended_early}" if done and done.ended_early else ""
        return f"**Finished** after {progress.step:,} steps{early}."
    reason = f": {ended.reason.partition(chr(10))[0]}" if ended.reason else ""
    return f"**{STATES[ended.state]}** after {step}{reason}. The same command resumes it."


def _reproduce(record: Record) -> str:
    commit = record.tags.get("mlflow.source.git.commit", "")
    is_dirty = record.tags.get("mlflow.source.git.dirty") == "true"
    changes = ", with the changes in the tag `mlflow.source.git.diff`" if is_dirty else ""
    return f"`{record.command}`" + (f" at commit `{commit[:10]}`{changes}" if commit else "")


def _workers(starts: tuple[Start, ...]) -> str:
    numbers = ", ".join(str(start["workers"]) for start in starts)
    return f"{numbers} (an attempt each)" if len(starts) > 1 else numbers


def _links(recorded: Recorded) -> str:
    run = _run(recorded.experiment_id, recorded.run_id)
    links = [f"[{name}](#{run}/artifacts/{name})" for name in FILES]
    if recorded.model_id:
        model = f"/experiments/{recorded.experiment_id}/models/{recorded.model_id}"
        links.append(f"[model](#{model})")
    return ", ".join(links)


def _date(milliseconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(milliseconds / 1000))


def _run(experiment_id: str, run_id: str) -> str:
    return f"/experiments/{experiment_id}/runs/{run_id}"
