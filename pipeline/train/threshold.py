"""Thresholds of yes and no, chosen on the validation rows with the weights of the trained model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.losses.objective import Objective
from pipeline.losses.terms import Term
from pipeline.metrics import Metric
from pipeline.metrics.ranking import cumulated_by_score
from pipeline.rundir.records import Numbers
from pipeline.spec.sections import Decision
from pipeline.train.term_metrics import Reading, TermMetric

Score = Callable[[Tensor, Tensor], Tensor]
"""From the weight of the noes and of the yeses that are predicted to be yes, at each threshold from
high to low, and in the end of all."""

SCORES: Mapping[Decision, Score] = {
    "f1": lambda noes, yeses: 2 * yeses / (noes + yeses + yeses[-1]),
    "balanced_accuracy": lambda noes, yeses: (1 + yeses / yeses[-1] - noes / noes[-1]) / 2,
    "accuracy": lambda noes, yeses: (yeses + noes[-1] - noes) / (yeses[-1] + noes[-1]),
}


class Column(NamedTuple):
    """A column of yes and no that has a threshold."""

    term: int
    place: int
    """Among the columns of its term."""
    name: str


def columns(objective: Objective) -> list[Column]:
    """All that have a threshold."""
    found = []
    for index, term in enumerate(objective.terms):
        own = objective.with_threshold(index).threshold
        if own is not None:
            names = _names(term, own.numel())
            found += [Column(index, place, name) for place, name in enumerate(names)]
    known = Counter(column.name for column in found)
    return [
        column._replace(name=f"{objective.terms[column.term].label}/{column.name}")
        if known[column.name] > 1
        else column
        for column in found
    ]


def choosers(objective: Objective, metric: Decision) -> list[TermMetric]:
    """Of each column its best threshold and what the metric is there, as metrics of all rows."""
    chosen = []
    for column in columns(objective):
        reading = Reading(column.term, "binary", "probabilities", False)
        for name, part in (("threshold", 0), (metric, 1)):
            value = partial(_value, part=part, place=column.place, score=SCORES[metric])
            metric_of_all = Metric(("binary",), None, value, reads="probabilities")
            chosen.append(TermMetric(f"{name}/{column.name}", metric_of_all, reading))
    return chosen


def decide(objective: Objective, values: Numbers) -> dict[str, Tensor]:
    """Put the chosen thresholds in their buffers, whose names and new values are returned.

    One that has no value stays as it is.
    """
    for column in columns(objective):
        value = values[f"threshold/{column.name}"]
        if value is not None and math.isfinite(value):
            objective.get_buffer(f"threshold_{column.term}").view(-1)[column.place] = value
    names = {f"threshold_{column.term}" for column in columns(objective)}
    return {name: objective.get_buffer(name).detach().cpu().clone() for name in names}


def best_threshold(
    prediction: Tensor, truth: Tensor, weight: Tensor, score: Score
) -> tuple[float, float]:
    """The threshold at which the score is highest, and that score; NaN without a yes or a no.

    It stands in the middle between two probabilities; the higher of equally good ones.
    """
    noes, yeses = cumulated_by_score(prediction, truth, weight)
    if bool(prediction.isnan().any()) or not (noes[-1] > 0 and yeses[-1] > 0):
        return math.nan, math.nan
    scores = score(noes, yeses)
    place = int(scores.argmax())
    ends = torch.unique(prediction).flip(0)
    lowest = -ends[-1:].eq(0).to(ends.dtype)  # below all of them
    ends = torch.cat([ends.new_ones(1), ends, lowest])
    above, below = ends[place], ends[place + 1]
    middle = (above + below) / 2
    return float(middle if below <= middle < above else below), float(scores[place])


def _value(
    prediction: Tensor, truth: Tensor, weight: Tensor, part: int, place: int, score: Score
) -> float:
    own = [tensor.reshape(len(tensor), -1)[:, place] for tensor in (prediction, truth, weight)]
    return best_threshold(own[0], own[1], own[2], score)[part]


def _names(term: Term, num: int) -> list[str]:
    if len(term.targets) == 1 and num > 1:
        return [f"{term.targets[0].name}[{place}]" for place in range(num)]
    return [field.name for field in term.targets]
