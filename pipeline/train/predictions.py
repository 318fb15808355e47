"""Predictions of validation rows as they are kept in a run's folder."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pipeline.data.columns import Field
from pipeline.data.origins import Origins
from pipeline.losses.objective import Objective
from pipeline.losses.targets import Items
from pipeline.losses.terms import Term
from pipeline.metrics import Task
from pipeline.rundir.held_out import HeldOut, TermPredictions


def held_out(
    objective: Objective, kept: Mapping[int, Items], step: int, origins: Origins
) -> HeldOut:
    """The items of each term, named, with the places of their rows."""
    described = [_describe(objective.with_threshold(index), items) for index, items in kept.items()]
    rows = np.unique(np.concatenate([one.row.ravel() for one in described]))
    num_rows = len(origins.index)
    places = Origins(origins.index[rows], origins.starts, origins.paths)
    return HeldOut(step, num_rows, len(rows) < num_rows, described, rows, places)


def _describe(term: Term, items: Items) -> TermPredictions:
    task = term.target.task(term)
    assert task is not None
    assert task != "survival"  # which has no pictures
    thresholds = () if term.threshold is None else term.threshold.double().flatten().tolist()
    prediction, truth, weight, row = (tensor.numpy() for tensor in items)
    return TermPredictions(
        term.label,
        task,
        "probabilities" in term.target.readable(term),
        _names(term, task, items),
        [_answers(field) for field in term.targets],
        prediction,
        truth,
        weight,
        row,
        tuple(thresholds),
    )


def _names(term: Term, task: Task, items: Items) -> list[str]:
    """Of the classes, or of each column of the predictions."""
    if task == "classes":
        known = [str(value) for value in term.targets[0].vocabulary or ()]
        return [*known, *map(str, range(len(known), items.prediction.shape[1]))]
    width = items.truth[0].numel() if len(items.truth) else 0
    if len(term.targets) == 1 and width > 1:
        return [f"{term.targets[0].name}[{place}]" for place in range(width)]
    return [field.name for field in term.targets]


def _answers(field: Field) -> tuple[str, str]:
    """What a column calls no and yes."""
    known = field.vocabulary
    return (str(known[0]), str(known[1])) if known and len(known) == 2 else ("no", "yes")
