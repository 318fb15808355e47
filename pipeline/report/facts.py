"""What a run is, in a few lines of text above its pictures."""

from __future__ import annotations

from pipeline.report.curves import Curves
from pipeline.rundir import RunDir
from pipeline.rundir.records import Done, Numbers, Record

UNFINISHED = "not finished; the same command resumes it"


def facts(run: RunDir, curves: Curves) -> dict[str, str]:
    """Each with its name; of a run without a record, only how far it has come."""
    lines: dict[str, str] = {}
    try:
        record = run.read_record()
    except (OSError, ValueError):
        record = None
    if record is not None:
        lines |= _job(record)
    done = run.read_done()
    best = done.best if done else None
    lines["state"] = _finished(done) if done else _unfinished(run)
    if best is not None:
        weights = f"with the weights after step {best.step:,} ({best.metric})"
        lines["model"] = ", ".join(filter(None, [lines.get("model"), weights]))
    metrics = best.metrics if best else last_values(curves)
    if metrics:
        lines["validation"] = verdict(metrics, curves.baselines)
    if done and done.test:
        lines["test"] = verdict(done.test.metrics, done.test.baselines)
    if record is not None:
        commit = record.tags.get("mlflow.source.git.commit", "")
        is_dirty = record.tags.get("mlflow.source.git.dirty") == "true"
        at = f" at commit {commit[:10]}{', with changes' if is_dirty else ''}" if commit else ""
        lines["reproduce"] = f"{record.command}{at}"
    return lines


def last_values(curves: Curves) -> Numbers:
    """The last evaluation's losses and metrics."""
    return {name: float(values[-1]) for name, (_, values) in curves.validation.items()}


def verdict(metrics: Numbers, baselines: Numbers) -> str:
    """Each value, beside what a constant prediction has."""
    shown = []
    for name, value in metrics.items():
        if value is not None:
            constant = baselines.get(name)
            beside = "" if constant is None else f" (a constant prediction: {constant:.4g})"
            shown.append(f"{name} {value:.4g}{beside}")
    return ", ".join(shown)


def _job(record: Record) -> dict[str, str]:
    params, data = record.params, record.data
    more = f" and {data.num_files - 1} more" if data.num_files > 1 else ""
    counts = [f"{count:,} for {split}" for split, count in data.rows.items() if count]
    return {
        "job": record.job,
        "model": params["model.name"],
        "loss": " + ".join(losses(params)),
        "rows": f"{data.files[0] if data.files else data.name}{more}: {', '.join(counts)}",
    }


def losses(params: dict[str, str]) -> list[str]:
    """Names of the job's losses."""
    parts = {key: key.split(".") for key in sorted(params)}
    return [params[k] for k, p in parts.items() if len(p) == 3 and (p[0], p[2]) == ("loss", "name")]


def _finished(done: Done) -> str:
    early = f", early: {done.ended_early}" if done.ended_early else ""
    return f"finished after {done.steps:,} steps{early}"


def _unfinished(run: RunDir) -> str:
    ended = run.read_ended()
    if ended is None or ended.state == "finished":
        return UNFINISHED
    reason = f": {ended.reason.partition(chr(10))[0]}" if ended.reason else ""
    return f"{ended.state}{reason}; the same command resumes it"
