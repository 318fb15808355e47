"""Predictions of validation rows as they are kept in a run's folder."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pipeline.data.origins import Origins
from pipeline.losses.targets import Items
from pipeline.losses.terms import Term
from pipeline.rundir.held_out import HeldOut, TermPredictions


def held_out(terms: list[Term], kept: Mapping[int, Items], step: int, origins: Origins) -> HeldOut:
    """The items of each term, named, with the places of their rows."""
    described = [_describe(terms[index], items) for index, items in kept.items()]
    rows = np.unique(np.concatenate([one.row.ravel() for one in described]))
    num_rows = len(origins.index)
    places = Origins(origins.index[rows], origins.starts, origins.paths)
    return HeldOut(step, num_rows, len(rows) < num_rows, described, rows, places)


def _describe(term: Term, items: Items) -> TermPredictions:
    task = term.target.task(term)
    assert task is not None
    names = [field.name for field in term.targets]
    if task == "classes":
        vocabulary = term.targets[0].vocabulary or range(items.prediction.shape[1])
        names = [str(value) for value in vocabulary]
    known = term.targets[0].vocabulary if task == "binary" else None
    return TermPredictions(
        term.label,
        task,
        "probabilities" in term.target.readable(term),
        names,
        [str(value) for value in known] if known and len(known) == 2 else ["no", "yes"],
        *(tensor.numpy() for tensor in items),
    )
