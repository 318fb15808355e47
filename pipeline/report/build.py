"""All that a run's folder shows of it, in the order in which it is read."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from pipeline.report import amounts, classes, curves, rows
from pipeline.report.exhibit import Exhibit
from pipeline.rundir import RunDir
from pipeline.rundir.held_out import HeldOut, TermPredictions
from pipeline.rundir.journal import Reader
from pipeline.rundir.records import Importance

LONGEST_NAME = 60


@dataclass(frozen=True)
class Report:
    """Pictures and tables of a run; what could not be made has a note."""

    exhibits: list[Exhibit]
    notes: list[str]

    def add(self, what: str, draw: Callable[[], list[Exhibit]]) -> None:
        """Draw something; whatever goes wrong, the rest is shown."""
        try:
            self.exhibits.extend(draw())
        except Exception as error:  # odd numbers and names can make a library fail in any way
            self.notes.append(f"{what} cannot be shown: {error or type(error).__name__}")


def build(run: RunDir, read: curves.Curves | None = None) -> Report:
    """The report of a run, of what its folder has by now; its journal may have been `read`.

    What cannot be drawn is left out, and a note says why.
    """
    known = read or curves.Curves().add(Reader(run.journal).new())
    report = Report([], [])
    report.add("the curves", lambda: curves.exhibits(known))
    held_out, note = _held_out(run)
    report.notes.extend([note] if note else [])
    if held_out is not None:
        _add_predictions(report, held_out)
    if run.importance.exists():
        report.add(run.importance.name, lambda: [rows.importance(Importance.read(run.importance))])
    report.add("the throughput", lambda: curves.throughput(known))
    return _numbered(report)


def of_predictions(held_out: HeldOut) -> Report:
    """What there is to see of predictions alone."""
    report = Report([], _notes(held_out))
    _add_predictions(report, held_out)
    return _numbered(report)


def _add_predictions(report: Report, held_out: HeldOut) -> None:
    for term in held_out.terms:
        report.add(f"the predictions of {term.label}", partial(_predictions, held_out, term))


def _numbered(report: Report) -> Report:
    """The report with names of its exhibits that sort as they are read."""
    numbered = [
        replace(one, name=f"{i:02}_{_file_name(one)}") for i, one in enumerate(report.exhibits, 1)
    ]
    return Report(numbered, report.notes)


def _predictions(held_out: HeldOut, term: TermPredictions) -> list[Exhibit]:
    """What there is to see of one term's predictions."""
    if not len(term.truth):
        return []
    shown = amounts.exhibits(term) if term.task == "values" else classes.exhibits(term)
    shown.append(rows.worst(held_out, term))
    if len(held_out.terms) == 1:
        return shown
    label = term.label
    return [
        replace(one, name=f"{label}_{one.name}", title=f"{one.title} ({label})") for one in shown
    ]


def _file_name(exhibit: Exhibit) -> str:
    """Its name as any disk and address takes it."""
    return re.sub(r"[^a-z0-9]+", "_", exhibit.name.lower())[:LONGEST_NAME].strip("_")


def _held_out(run: RunDir) -> tuple[HeldOut | None, str]:
    """The predictions of validation rows, or why there are none."""
    if not run.held_out.exists():
        return None, ""
    try:
        held_out = HeldOut.read(run.held_out)
    except (OSError, ValueError) as error:
        return None, str(error)
    done = run.read_done()
    decided = held_out.decided(done.decision) if done else held_out
    return decided, " ".join(_notes(decided))


def _notes(held_out: HeldOut) -> list[str]:
    """What its pictures do not show."""
    notes = []
    if held_out.is_sample:
        shown = f"{len(held_out.rows):,} of {held_out.num_rows:,}"
        notes.append(f"Pictures of predictions show {shown} rows.")
    if any((term.weight != 1).any() for term in held_out.terms):
        notes.append("Pictures count each row once, whatever its weight in the metrics.")
    return notes
