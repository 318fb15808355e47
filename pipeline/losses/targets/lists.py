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
    """Class numbers of each row, then -1: int64 [N, C]."""

    name = "class_lists"

    def read(self, column: Tensor, field: Field) -> Tensor:
        return column.long()

    def check_values(self, label: str, name: str, target: Tensor) -> None:
        num_classes = target.shape[1] if target.dim() == 2 else 0
        if num_classes > 2 and bool(((target == 0) | (target == 1)).all()):
            raise ContractError(
                label,
                f"target {name!r} looks one-hot; this loss reads class numbers, then -1",
                "use multilabel_soft_margin or bce_with_logits for 0/1 targets",
            )
        if not bool(((target >= -1) & (target < num_classes)).all()):
            raise ContractError(
                label,
                f"target {name!r} holds class {int(target.max())}, rows have {num_classes} places",
                f"number the classes 0 to {num_classes - 1} and fill up with -1",
            )


class Tokens(Target):
    """Lists of class numbers without the blank: ragged int64."""

    name, gives_width = "tokens", False

    def arguments(
        self, term: Term, columns: list[Column], prediction: Tensor | None
    ) -> list[Column]:
        first, *others = columns
        if isinstance(first, Ragged):
            first = Ragged(_around(first.values, term.loss.blank), first.lengths)
        return [first, *others]

    def check_fields(self, label: str, fields: Sequence[Field]) -> None:
        first = fields[0]
        if not isinstance(first, TokenColumn):
            problem = f"target {first.name!r} is {first.arrow_type}"
            raise ContractError(label, problem, "give a column of lists of tokens")


class NoTarget(Target):
    """The loss only compares predictions."""

    name, gives_width = "none", False

    def arguments(
        self, term: Term, columns: list[Column], prediction: Tensor | None
    ) -> list[Column]:
        return []


def _around(values: Tensor, blank: int | None) -> Tensor:
    """Token numbers with the blank's number left free."""
    return values if blank is None else values + (values >= blank).to(values.dtype)
