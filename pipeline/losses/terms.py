"""A loss that knows its outputs, its target columns and its weight in the sum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.data.batch import Batch, Column, num_rows
from pipeline.data.columns import Field
from pipeline.errors import ContractError
from pipeline.losses.contract import Loss
from pipeline.losses.targets import TARGETS, Target
from pipeline.registry import nearest

Predictions = Mapping[str, Tensor]


@dataclass(frozen=True)
class Term:
    """A loss that knows its outputs, its target columns and its weight in the sum."""

    label: str
    weight: float
    loss: Loss
    outputs: tuple[str, ...]
    targets: tuple[Field, ...]
    threshold: Tensor | None = None
    """Probability above which yes is predicted, for each column, where it is not a half."""

    def arguments(self, predictions: Predictions, batch: Batch) -> list[Any]:
        """Predictions, then targets, as the loss takes them; predictions in full precision."""
        read = self.read(predictions)
        return [*read, *self.truth(batch, read[0])]

    def read(self, predictions: Predictions) -> list[Tensor]:
        """The outputs that the loss reads, in its order and in full precision."""
        return [self._prediction(predictions, name) for name in self.outputs]

    def _prediction(self, predictions: Predictions, name: str) -> Tensor:
        if name not in predictions:
            raise ContractError(
                self.label,
                f"the model gives no output {name!r}, only {', '.join(predictions)}",
                f"return it, or name another with `prediction:`{nearest(name, predictions)}",
            )
        prediction = predictions[name]
        low = prediction.dtype in (torch.bfloat16, torch.float16)
        return prediction.float() if low else prediction

    @property
    def target(self) -> Target:
        """The kind of target that the loss reads."""
        return TARGETS[self.loss.target]

    def truth(self, batch: Batch, prediction: Tensor | None = None) -> list[Column]:
        """Targets as the loss takes them; class lists padded to the prediction's positions."""
        columns = [batch[field.name] for field in self.targets]
        return self.target.arguments(self, columns, prediction)

    def denominator(self, batch: Batch) -> Tensor:
        """What each row adds to the denominator of this term: float64 [N]."""
        assert self.loss.denominator is not None, "resolved when an objective is constructed"
        rows = num_rows(batch)
        counts = self.loss.denominator(rows, *self.truth(batch))
        if counts.shape != (rows,):
            raise ContractError(
                self.label,
                f"its denominator gives shape {list(counts.shape)} for {rows} rows",
                "return what each row adds to it: float64 [num_rows]",
            )
        return counts

    def served(self, head: nn.Module | None, predictions: Predictions) -> Tensor:
        """The prediction on the target's scale: probabilities, rates or values."""
        read = self.read(predictions)
        if self.loss.link is None:
            return read[0]
        return self.loss.link(*([head] if head is not None else []), *read)


def num_classes(term: Term) -> int:
    """Classes of the term's target in the training rows."""
    return term.targets[0].num_codes if term.targets else 0


def check_targets(terms: list[Term], rows: Batch) -> None:
    """Refuse targets that a loss cannot mean; `rows` are the target columns of all rows."""
    for term in terms:
        for truth in term.truth(rows)[:1]:
            if isinstance(truth, Tensor) and truth.numel():
                term.target.check_values(term.label, term.targets[0].name, truth)
