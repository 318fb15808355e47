"""What all kinds of targets share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.data.batch import Column, Ragged
from pipeline.data.columns import Field
from pipeline.errors import ContractError

if TYPE_CHECKING:
    from pipeline.losses.terms import Term
    from pipeline.metrics import Reads, Task


class Items(NamedTuple):
    """Predictions, truths and weights of the same items, or rows."""

    prediction: Tensor
    truth: Tensor
    weight: Tensor
    """float64, of the truth's shape; of rows [N]."""
    row: Tensor
    """Which row of the data set each is of, in the same shape: int64."""

    def part(self, rows: slice) -> Items:
        """Those of some rows."""
        return Items(*(tensor[rows] for tensor in self))


class Target:
    """What all kinds have in common: numbers with a meaning of their own, without metrics."""

    name: ClassVar[str]
    is_class: ClassVar[bool] = False
    """Whether its columns are read through a vocabulary, as classes."""
    is_amount: ClassVar[bool] = False
    """Whether its columns may be scaled."""
    needs_float64: ClassVar[bool] = False
    """Whether numbers are kept in float64, as times whose order counts."""
    is_declared: ClassVar[bool] = True
    """Whether the loss says what it reads."""
    sets_prediction_width: ClassVar[bool] = True
    """Whether a prediction is as wide as its target."""

    def arguments(
        self, term: Term, columns: list[Column], prediction: Tensor | None
    ) -> list[Column]:
        """The columns as the loss takes them; class lists padded to the prediction's positions."""
        both = zip(columns, term.targets, strict=True)
        read = [self._padded(term, column, field) for column, field in both]
        joined = torch.stack(read, dim=1) if len(read) > 1 else read[0]
        if prediction is not None and prediction.dim():
            missing = prediction.shape[-1] - joined.shape[-1]
            if isinstance(columns[0], Ragged) and missing > 0:
                joined = nn.functional.pad(joined, (0, missing), value=padding_of(term))
            if joined.is_floating_point() and prediction.is_floating_point():
                joined = joined.to(prediction.dtype)
        return [joined]

    def _padded(self, term: Term, column: Column, field: Field) -> Tensor:
        if isinstance(column, Ragged):
            return column.padded(padding_of(term))
        return self.read(column, field)

    def read(self, column: Tensor, field: Field) -> Tensor:
        """A column of single values, or of tensors, as the loss takes it."""
        return floating(field.numbers(column))

    def check_fields(self, label: str, fields: Sequence[Field]) -> None:
        """Raise ContractError for columns that cannot be meant, before any row is looked at."""
        odd = [field.name for field in fields if not field.is_single]
        if len(fields) > 1 and odd:
            raise ContractError(
                label,
                f"target {odd[0]!r} holds lists; targets that share a loss are single values",
                "give it a loss of its own",
            )
        for field in fields:
            self.check_field(label, field)

    def check_field(self, label: str, field: Field) -> None:
        """`check_fields` for one of them."""

    def check_values(self, label: str, name: str, target: Tensor) -> None:
        """Raise ContractError for values of column `name` that the loss cannot mean."""

    def task(self, term: Term) -> Task | None:
        """Which metrics it has; None for none."""
        return None

    def readable(self, term: Term) -> tuple[Reads, ...]:
        """What metrics can read of its predictions."""
        return ()

    def usual_metrics(self, term: Term) -> tuple[str, ...]:
        """What its predictions are judged by unless the spec says, the most telling one first."""
        return ()

    def compared(self, term: Term, rows: Items, reads: Reads, centered: bool) -> Items:
        """The items of rows as a metric takes them that `reads` these.

        Rows have what is served for them, their truth as the loss takes it, and a weight each.
        """
        raise NotImplementedError(f"targets of {self.name} have no metrics")

    def constant(self, term: Term, reads: Reads, centered: bool) -> Tensor | None:
        """What `compared` would make of a prediction that knows the training targets only.

        One item, without its dimension of items: their mean, their most frequent class or the share
        of each class. None where the columns do not keep these.
        """
        return None

    def nothing(self, term: Term, width: int, reads: Reads) -> tuple[Tensor, Tensor]:
        """Prediction and truth of no rows, with `width` numbers of the prediction in each."""
        raise NotImplementedError(f"targets of {self.name} have no metrics")

    def in_units(self, term: Term, served: Tensor) -> Tensor:
        """What is served, in the unit of the target columns."""
        return served

    def decode(self, term: Term, served: Tensor) -> dict[str, Any]:
        """Named columns of the served model: labels and probabilities, or values in their unit."""
        if not term.targets:
            return {term.label: served.tolist()}
        if len(term.targets) == 1:
            return self.decode_one(term.targets[0], served)
        if served.dim() != 2 or served.shape[1] != len(term.targets):
            return as_it_is(term.targets[0], served)
        columns: dict[str, Any] = {}
        for field, values in zip(term.targets, served.unbind(1), strict=True):
            columns |= self.decode_one(field, values)
        return columns

    def decode_one(self, field: Field, served: Tensor) -> dict[str, Any]:
        """The columns of one target."""
        return as_it_is(field, served)


def of_items(rows: Tensor, truth: Tensor) -> Tensor:
    """What each row has [N], for each of its items: of the truth's shape."""
    return rows.reshape(-1, *[1] * (truth.dim() - 1)).expand_as(truth)


def padding_of(term: Term) -> int:
    if term.loss.ignore_index is None:
        raise ContractError(
            term.label,
            f"target {term.targets[0].name!r} holds lists of different lengths",
            "use cross_entropy, nll or ctc, or lists of one fixed size",
        )
    return term.loss.ignore_index


def floating(column: Tensor) -> Tensor:
    """Numbers as they are, codes of categories as float32."""
    return column if column.is_floating_point() else column.float()


def labels_of(field: Field, codes: Tensor) -> list[Any]:
    """The column's own values for class numbers."""
    vocabulary = field.vocabulary
    return [vocabulary[code] if vocabulary else code for code in codes.tolist()]


def some_of(field: Field) -> str:
    values = [repr(value) for value in (field.vocabulary or ())[:4]]
    return ", ".join(values) + (", ..." if len(field.vocabulary or ()) > 4 else "")


def unmeant(label: str, name: str, target: Tensor, expected: str, fix: str) -> ContractError:
    """The error of a column whose values are not what is expected."""
    low = float(target.min())
    high = float(target.max())
    problem = f"target {name!r} holds values from {low:g} to {high:g}{expected}"
    return ContractError(label, problem, fix)


def as_it_is(field: Field, served: Tensor) -> dict[str, Any]:
    return {field.name: served.numpy() if served.dim() == 1 else served.tolist()}
