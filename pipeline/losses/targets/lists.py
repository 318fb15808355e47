"""Targets that are lists of class numbers, and losses without a target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from pipeline.data.batch import Column, Ragged
from pipeline.data.columns import Field
from pipeline.data.columns import Tokens as TokenColumn
from pipeline.errors import ContractError
from pipeline.losses.targets.base import Target

if TYPE_CHECKING:
    from pipeline.losses.terms import Term


class ClassLists(Target):
    """Class numbers of each row, padded with -1: int64 [N, C], as in MultiLabelMarginLoss."""

    name = "class_lists"

    def read(self, column: Tensor, field: Field) -> Tensor:
        return column.long()

    def check_values(self, label: str, name: str, target: Tensor) -> None:
        if target.dim() != 2:
            raise ContractError(
                label,
                f"target {name!r} has one number a row; this loss reads a list of classes",
                "give a column of lists, padded with -1 to the number of classes",
            )
        num_classes = target.shape[1]
        if num_classes > 2 and bool(((target == 0) | (target == 1)).all()):
            raise ContractError(
                label,
                f"target {name!r} looks one-hot; this loss reads class numbers, then -1",
                "use multilabel_soft_margin or bce_with_logits for 0/1 targets",
            )
        invalid = target[(target < -1) | (target >= num_classes)]
        if len(invalid):
            raise ContractError(
                label,
                f"target {name!r} holds class {int(invalid[0])}, rows have {num_classes} places",
                f"number the classes 0 to {num_classes - 1} and pad with -1",
            )


class Tokens(Target):
    """Lists of token codes, ragged int64, for CTC: the code of its blank is left free."""

    name = "tokens"
    sets_prediction_width = False

    def arguments(
        self, term: Term, columns: list[Column], prediction: Tensor | None
    ) -> list[Column]:
        tokens, *lengths = columns  # a second column holds the lengths of the predictions
        assert isinstance(tokens, Ragged)
        return [Ragged(_skip_blank(tokens.values, term.loss.blank), tokens.lengths), *lengths]

    def check_fields(self, label: str, fields: Sequence[Field]) -> None:
        first = fields[0]
        if not isinstance(first, TokenColumn):
            problem = f"target {first.name!r} is {first.arrow_type}"
            raise ContractError(label, problem, "give a column of lists of tokens")


class NoTarget(Target):
    """The loss only compares predictions."""

    name = "none"
    sets_prediction_width = False

    def arguments(
        self, term: Term, columns: list[Column], prediction: Tensor | None
    ) -> list[Column]:
        return []


def _skip_blank(values: Tensor, blank: int | None) -> Tensor:
    """The codes, those from `blank` on moved up by one, so that no token has the blank's."""
    return values if blank is None else values + (values >= blank).to(values.dtype)
