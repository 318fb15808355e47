"""What a constant prediction gets: the mean, the median, the most frequent class, the shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.data.dataset import Dataset
from pipeline.data.streaming import Streamed
from pipeline.losses.targets import Items
from pipeline.losses.terms import Term
from pipeline.train.term_metrics import TermMetric

MEDIAN_ROWS = 10**6
"""Training rows, evenly spaced, whose median is taken for that of all."""


@dataclass(frozen=True, eq=False)
class Baseline(TermMetric):
    """The metric of a constant prediction: what a model has to beat."""

    constant: Tensor
    """One item, as the metric takes it."""

    def seen(self, items: Items) -> Items:
        """The items with the constant for each prediction."""
        return items._replace(
            prediction=self.constant.to(items.prediction).expand_as(items.prediction)
        )


def choose_baselines(
    terms: list[Term], metrics: Sequence[TermMetric], train: Dataset
) -> list[Baseline]:
    """Each metric of what is best without inputs, where the training targets tell what that is."""
    baselines = []
    for one in metrics:
        if one.metric.baseline is None:
            continue
        term = terms[one.reading.term]
        constant = term.target.constant(term, one.reading.reads, one.reading.centered)
        if constant is not None and one.metric.baseline == "median":
            constant = _median(term, train, constant)
        if constant is not None:
            baselines.append(Baseline(one.name, one.metric, one.reading, constant))
    return baselines


def _median(term: Term, train: Dataset, mean: Tensor) -> Tensor:
    """The training targets' median, of a million rows at most; the mean of rows not at hand."""
    if isinstance(train, Streamed):
        return mean
    rows = np.unique(np.linspace(0, len(train) - 1, min(len(train), MEDIAN_ROWS)).astype(np.int64))
    truth = term.truth(train.columns([field.name for field in term.targets], rows))[0]
    assert isinstance(truth, Tensor)
    items = Items(truth, truth, torch.ones(len(truth)), torch.from_numpy(rows))
    amounts = term.target.compared(term, items, "amounts", False).truth
    return torch.from_numpy(np.median(amounts.numpy(), axis=0))
