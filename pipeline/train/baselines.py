"""What a constant prediction gets: the mean, the median, the most frequent class, the shares."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.data.dataset import Dataset
from pipeline.data.streaming import Streamed
from pipeline.losses.targets import Items
from pipeline.losses.terms import Term
from pipeline.train.term_metrics import TermMetric

MAX_ROWS = 10**6
"""Training rows, evenly spaced, whose median is taken for that of all."""


@dataclass(frozen=True, eq=False)
class Baseline(TermMetric):
    """The metric of a constant prediction: what a model has to beat."""

    constant: Tensor
    """One item, as the metric takes it."""

    def seen(self, items: Items) -> Items:
        """The items with the constant for each prediction."""
        constant = self.constant.to(items.prediction)
        if constant.dim():  # a model may tell more classes apart than there are
            missing = items.prediction.shape[-1] - constant.shape[-1]
            constant = torch.nn.functional.pad(constant, (0, missing))
        return items._replace(prediction=constant.expand_as(items.prediction))


def choose_baselines(
    terms: list[Term], metrics: Sequence[TermMetric], train: Dataset | None
) -> list[Baseline]:
    """Each metric of what is best without inputs, where the training targets tell what that is.

    Without `train` there is no baseline that needs the training rows, as a median does.
    """
    baselines = []
    for one in metrics:
        if one.metric.baseline is None:
            continue
        term = terms[one.reading.term]
        reads, is_centered = one.reading.reads, one.reading.centered
        constant = term.target.constant(term, reads, is_centered)
        if constant is None:
            continue
        if one.reading.task == "values" and not isinstance(train, Streamed):
            share_scale = constant.numel() < _width(term)  # positions of a vector
            if one.metric.baseline == "median" or share_scale:
                if train is None:
                    continue
                middle = np.median if one.metric.baseline == "median" else np.mean
                constant = _middle(term, train, is_centered, middle)
        baselines.append(Baseline(one.name, one.metric, one.reading, constant))
    return baselines


def _width(term: Term) -> int:
    """How many numbers a row of the targets has."""
    return sum(math.prod(field.shape) for field in term.targets)


def _middle(term: Term, train: Dataset, is_centered: bool, middle: Callable[..., Any]) -> Tensor:
    """The mean or median of each column of the training targets, of a million rows at most."""
    rows = np.unique(np.linspace(0, len(train) - 1, min(len(train), MAX_ROWS)).astype(np.int64))
    truth = term.truth(train.columns([field.name for field in term.targets], rows))[0]
    assert isinstance(truth, Tensor)
    items = Items(truth, truth, torch.ones(len(truth)), torch.from_numpy(rows))
    amounts = term.target.compared(term, items, "amounts", is_centered).truth
    return torch.from_numpy(np.asarray(middle(amounts.numpy(), axis=0)))
