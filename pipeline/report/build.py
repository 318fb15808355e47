"""All that a run's folder shows of it, in the order in which it is read."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from pipeline.report import amounts, classes, curves, rows
from pipeline.report.exhibit import Exhibit
from pipeline.rundir import RunDir
from pipeline.rundir.held_out import HeldOut
from pipeline.rundir.journal import Reader
from pipeline.rundir.records import Importance

LONGEST_NAME = 60


@dataclass(frozen=True)
class Report:
    """Pictures and tables of a run; what could not be made has a note."""

    exhibits: list[Exhibit]
    notes: list[str]


def build(run: RunDir, read: curves.Curves | None = None) -> Report:
    """The report of a run, of what its folder has by now; its journal may have been `read`."""
    made = curves.exhibits(read or curves.Curves().add(Reader(run.journal).new()))
    notes = []
    held_out, note = _held_out(run)
    notes += [note] if note else []
    if held_out is not None:
        several = len(held_out.terms) > 1
        for term in held_out.terms:
            shown = amounts.exhibits(term) if term.task == "values" else classes.exhibits(term)
            shown.append(rows.worst(held_out, term))
            made += [_of_term(one, term.label) for one in shown] if several else shown
    if run.importance.exists():
        try:
            made.append(rows.importance(Importance.read(run.importance)))
        except ValueError as error:
            notes.append(f"{run.importance.name}: {error}")
    numbered = [replace(one, name=f"{i:02}_{_file_name(one)}") for i, one in enumerate(made, 1)]
    return Report(numbered, notes)


def _file_name(exhibit: Exhibit) -> str:
    """Its name as any disk and address takes it."""
    return re.sub(r"[^a-z0-9]+", "_", exhibit.name.lower())[:LONGEST_NAME].strip("_")


def _of_term(exhibit: Exhibit, label: str) -> Exhibit:
    """One of several terms."""
    return replace(exhibit, name=f"{label}_{exhibit.name}", title=f"{exhibit.title} ({label})")


def _held_out(run: RunDir) -> tuple[HeldOut | None, str]:
    """The predictions of validation rows, or why there are none."""
    if not run.held_out.exists():
        return None, ""
    try:
        held_out = HeldOut.read(run.held_out)
    except (OSError, ValueError) as error:
        return None, str(error)
    note = ""
    if held_out.is_sample:
        note = (
            f"Pictures of predictions show {len(held_out.rows):,} of "
            f"{held_out.num_rows:,} validation rows."
        )
    return held_out, note
