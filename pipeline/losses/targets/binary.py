"""Targets of two classes: from 0 to 1, or -1 and 1."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.columns import Field
from pipeline.errors import ContractError
from pipeline.losses.targets.base import (
    Items,
    Target,
    as_it_is,
    floating,
    labels_of,
    of_items,
    some_of,
    unmeant,
)

if TYPE_CHECKING:
    from pipeline.losses.terms import Term
    from pipeline.metrics import Reads, Task


class Binary(Target):
    """Yes or no, or how much of it: float32 from 0 to 1."""

    name = "binary"
    threshold: ClassVar[float] = 0.5
    served_as: ClassVar[str] = "probability"

    def read(self, column: Tensor, field: Field) -> Tensor:
        return floating(column)

    def check_field(self, label: str, field: Field) -> None:
        values = field.vocabulary
        if field.is_single and values is not None and len(values) != 2:
            raise ContractError(
                label,
                f"target {field.name!r} has {len(values)} distinct values: {some_of(field)}",
                "two are needed; for more classes use cross_entropy",
            )

    def check_values(self, label: str, name: str, target: Tensor) -> None:
        if float(target.min()) < 0 or float(target.max()) > 1:
            fix = "store yes and no as 0 and 1, true and false, or two texts"
            raise unmeant(label, name, target, ", expected 0 to 1", fix)

    def task(self, term: Term) -> Task | None:
        return "binary" if term.loss.shape == "as_target" else None

    def readable(self, term: Term) -> tuple[Reads, ...]:
        return "labels", "scores", "probabilities"

    def usual_metrics(self, term: Term) -> tuple[str, ...]:
        of_scores = "roc_auc", "average_precision"
        of_labels = "f1", "balanced_accuracy", "accuracy"
        return *of_scores, *of_labels, "log_loss", "brier", "calibration_error"

    def compared(self, term: Term, rows: Items, reads: Reads, centered: bool) -> Items:
        served, truth, weight, row = rows
        prediction = served > self._threshold_of(term) if reads == "labels" else served
        is_yes = truth > self.threshold
        return Items(prediction, is_yes, of_items(weight, truth), of_items(row, truth))

    def constant(self, term: Term, reads: Reads, centered: bool) -> Tensor | None:
        shares = [self._share_of_yes(field) for field in term.targets]
        if None in shares:
            return None
        share = torch.tensor(shares, dtype=torch.float64)
        share = share[0] if len(shares) == 1 else share
        return share > 0.5 if reads == "labels" else share

    def _share_of_yes(self, field: Field) -> Any:
        """Of the training rows; by position for vectors; None where it is not known."""
        if field.counts is not None:
            return field.counts[-1] / sum(field.counts)
        return self._share_at(np.asarray(field.center)).tolist() if field.is_amount else None

    @staticmethod
    def _share_at(mean: NDArray[Any]) -> NDArray[Any]:
        """The share of yes at a mean of the column."""
        return mean

    def nothing(self, term: Term, width: int, reads: Reads) -> tuple[Tensor, Tensor]:
        shape = term.targets[0].shape if len(term.targets) == 1 else (len(term.targets),)
        truth = torch.zeros(0, *shape, dtype=torch.bool)
        return truth if reads == "labels" else torch.zeros(0, *shape), truth

    def _threshold_of(self, term: Term) -> Tensor | float:
        """What a prediction of yes is above, by column."""
        return self.threshold if term.threshold is None else term.threshold

    def decode(self, term: Term, served: Tensor) -> dict[str, Any]:
        columns = super().decode(term, served)
        if term.threshold is None:
            return columns
        alone = len(term.targets) == 1
        each = [served] if alone else served.unbind(1)
        least = [term.threshold] if alone else term.threshold.unbind()
        for field, values, threshold in zip(term.targets, each, least, strict=True):
            if values.dim() == 1:
                columns[field.name] = labels_of(field, (values > threshold.cpu()).long())
        return columns

    def decode_one(self, field: Field, served: Tensor) -> dict[str, Any]:
        if served.dim() != 1:
            return as_it_is(field, served)
        labels = labels_of(field, (served > self.threshold).long())
        positive = f"_{field.vocabulary[-1]}" if field.vocabulary else ""
        return {field.name: labels, f"{field.name}_{self.served_as}{positive}": served.numpy()}


class Signs(Binary):
    """Two classes: float32, -1 or 1."""

    name = "signs"
    threshold = 0.0
    served_as = "score"

    @staticmethod
    def _share_at(mean: NDArray[Any]) -> NDArray[Any]:
        return (mean + 1) / 2

    def readable(self, term: Term) -> tuple[Reads, ...]:
        return "labels", "scores"

    def usual_metrics(self, term: Term) -> tuple[str, ...]:
        return "roc_auc", "average_precision", "f1", "balanced_accuracy", "accuracy"

    def read(self, column: Tensor, field: Field) -> Tensor:
        return column if column.is_floating_point() else column.float() * 2 - 1

    def check_values(self, label: str, name: str, target: Tensor) -> None:
        if not bool(((target == 1) | (target == -1)).all()):
            fix = "map 0 to -1, or store the two classes as booleans or text"
            raise unmeant(label, name, target, ", expected -1 and 1 only", fix)
