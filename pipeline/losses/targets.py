"""The kinds of targets: how a loss reads its target columns, and what its predictions mean.

A kind is one class here. `Loss.target` names it; everything that differs between kinds is asked of
it: how a column is read and checked, which metrics it has, and what a prediction is served as.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from pipeline.data.batch import Column, Ragged
from pipeline.data.columns import IGNORED, Field
from pipeline.data.columns import Tokens as TokenColumn
from pipeline.errors import ContractError

if TYPE_CHECKING:
    from pipeline.losses.terms import Term
    from pipeline.metrics import Reads, Task

MOST_PROBABILITIES = 1000
"""With more classes than this, only the best class and its probability are served."""
SUM_ATOL = 1e-3
"""How far probabilities of a row may sum to something else than 1."""


class Target:
    """What all kinds have in common: numbers with a meaning of their own, without metrics."""

    name: ClassVar[str]
    is_class: ClassVar[bool] = False
    """Whether its columns are read through a vocabulary, as classes."""
    is_amount: ClassVar[bool] = False
    """Whether its columns may be scaled."""
    is_declared: ClassVar[bool] = True
    """Whether the loss says what it reads."""
    gives_width: ClassVar[bool] = True
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
                joined = nn.functional.pad(joined, (0, missing), value=_padding(term))
            if joined.is_floating_point() and prediction.is_floating_point():
                joined = joined.to(prediction.dtype)
        return [joined]

    def _padded(self, term: Term, column: Column, field: Field) -> Tensor:
        if isinstance(column, Ragged):
            return column.padded(_padding(term))
        return self.read(column, field)

    def read(self, column: Tensor, field: Field) -> Tensor:
        """A column of single values, or of tensors, as the loss takes it."""
        return _floating(field.numbers(column))

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
        """As `check_fields`, for one of them."""

    def check_values(self, label: str, name: str, target: Tensor) -> None:
        """Raise ContractError for values of column `name` that the loss cannot mean."""

    def task(self, term: Term) -> Task | None:
        """Which metrics it has; None for none."""
        return None

    def compared(
        self, term: Term, served: Tensor, truth: Tensor, reads: Reads | None, centered: bool
    ) -> tuple[Tensor, Tensor]:
        """Prediction and truth as a metric takes them that `reads` labels or probabilities."""
        raise NotImplementedError(f"targets of {self.name} have no metrics")

    def nothing(self, term: Term, width: int, reads: Reads | None) -> tuple[Tensor, Tensor]:
        """The same for no rows, with `width` numbers of the prediction in each."""
        raise NotImplementedError(f"targets of {self.name} have no metrics")

    def decode(self, term: Term, served: Tensor) -> dict[str, Any]:
        """Named columns of the served model: labels and probabilities, or values in their unit."""
        if not term.targets:
            return {term.label: served.tolist()}
        if len(term.targets) == 1:
            return self.decode_one(term.targets[0], served)
        if served.dim() != 2 or served.shape[1] != len(term.targets):
            return _as_it_is(term.targets[0], served)
        columns: dict[str, Any] = {}
        for field, values in zip(term.targets, served.unbind(1), strict=True):
            columns |= self.decode_one(field, values)
        return columns

    def decode_one(self, field: Field, served: Tensor) -> dict[str, Any]:
        """The columns of one target."""
        return _as_it_is(field, served)


class _Amounts(Target):
    """Numbers in a column's own unit, which may be scaled."""

    is_amount = True

    def task(self, term: Term) -> Task | None:
        return "values"

    def compared(
        self, term: Term, served: Tensor, truth: Tensor, reads: Reads | None, centered: bool
    ) -> tuple[Tensor, Tensor]:
        both = (unscaled(term.targets, values, centered) for values in (served, truth))
        one, other = (values.reshape(len(values), -1) for values in both)
        return one, other

    def nothing(self, term: Term, width: int, reads: Reads | None) -> tuple[Tensor, Tensor]:
        shape = term.targets[0].shape if len(term.targets) == 1 else (len(term.targets),)
        numbers = torch.zeros(0, math.prod(shape))
        return numbers, numbers

    def decode_one(self, field: Field, served: Tensor) -> dict[str, Any]:
        return _as_it_is(field, unscaled([field], served) if field.is_amount else served)


class AnyTarget(_Amounts):
    """What a custom loss reads that does not say it: the column as it is stored."""

    name, is_declared = "any", False

    def read(self, column: Tensor, field: Field) -> Tensor:
        return field.numbers(column)

    def task(self, term: Term) -> Task | None:
        are_numbers = all(field.is_single and field.is_amount for field in term.targets)
        return "values" if term.targets and are_numbers else None


class Values(_Amounts):
    """Numbers: float32."""

    name = "values"

    def check_field(self, label: str, field: Field) -> None:
        if field.vocabulary is not None and not _is_numeric(field):
            raise ContractError(
                label,
                f"target {field.name!r} holds {_some(field)}, the loss needs numbers",
                "for classes use cross_entropy, for two classes bce_with_logits",
            )


class Counts(Values):
    """Whole numbers from 0: float32."""

    name, is_amount = "counts", False

    def check_values(self, label: str, name: str, target: Tensor) -> None:
        if float(target.min()) < 0:
            fix = "use mse or huber for other amounts"
            raise _unmeant(label, name, target, ", counts are at least 0", fix)


class _Vocabulary(Target):
    """Numbers of a vocabulary's entries: int64."""

    is_class, gives_width = True, False

    def read(self, column: Tensor, field: Field) -> Tensor:
        return column.long()

    def check_field(self, label: str, field: Field) -> None:
        if field.is_amount:
            problem = f"target {field.name!r} is {field.arrow_type}"
            raise ContractError(label, problem, "store the classes as text or integers")
        if field.is_single and field.num_codes < 2:
            raise ContractError(
                label,
                f"target {field.name!r} has one class only ({_some(field)}): the loss would always "
                "be 0",
                "check data.target and the training rows",
            )


class Groups(_Vocabulary):
    """Rows of one number belong together: int64."""

    name = "groups"


class Classes(_Vocabulary):
    """Class numbers, or `ignore_index`: int64."""

    name = "classes"

    def task(self, term: Term) -> Task | None:
        return "classes"

    def compared(
        self, term: Term, served: Tensor, truth: Tensor, reads: Reads | None, centered: bool
    ) -> tuple[Tensor, Tensor]:
        kept = truth != IGNORED
        served = served.movedim(1, -1)[kept]
        return served.argmax(1) if reads == "labels" else served, truth[kept]

    def nothing(self, term: Term, width: int, reads: Reads | None) -> tuple[Tensor, Tensor]:
        numbers = torch.zeros(0, dtype=torch.int64)
        return numbers if reads == "labels" else torch.zeros(0, width), numbers

    def decode(self, term: Term, served: Tensor) -> dict[str, Any]:
        if not term.targets or served.dim() != 2:
            return super().decode(term, served)
        field = term.targets[0]
        labels = _labels(field, served.argmax(1))
        if served.shape[1] > MOST_PROBABILITIES:
            best = served.max(1).values.tolist()
            return {field.name: labels, f"{field.name}_probability": best}
        columns = served.unbind(1)
        kind = "probability" if term.loss.link is not None else "score"
        named = zip(field.vocabulary or range(len(columns)), columns, strict=False)
        shares = {f"{field.name}_{kind}_{value}": column.numpy() for value, column in named}
        return {field.name: labels} | shares


class Binary(Target):
    """Yes or no, or how much of it: float32 from 0 to 1."""

    name = "binary"
    threshold: ClassVar[float] = 0.5
    served_as: ClassVar[str] = "probability"

    def read(self, column: Tensor, field: Field) -> Tensor:
        return _floating(column)

    def check_field(self, label: str, field: Field) -> None:
        values = field.vocabulary
        if field.is_single and values is not None and len(values) != 2:
            raise ContractError(
                label,
                f"target {field.name!r} has {len(values)} distinct values: {_some(field)}",
                "two are needed; for more classes use cross_entropy",
            )

    def check_values(self, label: str, name: str, target: Tensor) -> None:
        if float(target.min()) < 0 or float(target.max()) > 1:
            fix = "store yes and no as 0 and 1, true and false, or two texts"
            raise _unmeant(label, name, target, ", expected 0 to 1", fix)

    def task(self, term: Term) -> Task | None:
        return "binary" if term.loss.shape == "as_target" else None

    def compared(
        self, term: Term, served: Tensor, truth: Tensor, reads: Reads | None, centered: bool
    ) -> tuple[Tensor, Tensor]:
        return served > self.threshold if reads == "labels" else served, truth > self.threshold

    def nothing(self, term: Term, width: int, reads: Reads | None) -> tuple[Tensor, Tensor]:
        truth = torch.zeros(0, dtype=torch.bool)
        return truth if reads == "labels" else torch.zeros(0), truth

    def decode_one(self, field: Field, served: Tensor) -> dict[str, Any]:
        if served.dim() != 1:
            return _as_it_is(field, served)
        labels = _labels(field, (served > self.threshold).long())
        positive = f"_{field.vocabulary[-1]}" if field.vocabulary else ""
        return {field.name: labels, f"{field.name}_{self.served_as}{positive}": served.numpy()}


class Signs(Binary):
    """Two classes: float32, -1 or 1."""

    name, threshold, served_as = "signs", 0.0, "score"

    def read(self, column: Tensor, field: Field) -> Tensor:
        return column if column.is_floating_point() else column.float() * 2 - 1

    def check_values(self, label: str, name: str, target: Tensor) -> None:
        if not bool(((target == 1) | (target == -1)).all()):
            fix = "map 0 to -1, or store the two classes as booleans or text"
            raise _unmeant(label, name, target, ", expected -1 and 1 only", fix)


class Distribution(Target):
    """Probabilities over the prediction's classes: float32."""

    name = "distribution"

    def check_values(self, label: str, name: str, target: Tensor) -> None:
        sums = target.sum(1)
        is_one = torch.allclose(sums, torch.ones_like(sums), atol=SUM_ATOL)
        if float(target.min()) < 0 or not is_one:
            fix = "divide each row by its sum; leave target_scale at none"
            expected = "; each row must be probabilities that sum to 1"
            raise _unmeant(label, name, target, expected, fix)


class LogDistribution(Target):
    """Logarithms of probabilities: float32."""

    name = "log_distribution"

    def check_values(self, label: str, name: str, target: Tensor) -> None:
        if float(target.max()) > 1e-6:
            fix = "set log_target to false, or take the logarithm of the target"
            expected = ", expected logarithms of probabilities (at most 0)"
            raise _unmeant(label, name, target, expected, fix)


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


KINDS: list[Target] = [
    Values(), Counts(), Classes(), Groups(), Binary(), Signs(), Distribution(), LogDistribution(),
    ClassLists(), Tokens(), NoTarget(), AnyTarget(),
]  # fmt: skip
TARGETS: dict[str, Target] = {kind.name: kind for kind in KINDS}
"""The kinds by the name that a `Loss` gives."""


def unscaled(fields: Sequence[Field], values: Tensor, centered: bool = False) -> Tensor:
    """Values in the unit of the target columns, float64; `centered`, less their training mean."""

    def stacked(amounts: list[Any]) -> Tensor:
        made = values.new_tensor(amounts, dtype=torch.float64)
        return made[0] if len(amounts) == 1 else made

    mean = stacked([field.mean for field in fields])
    if centered:
        mean = mean - stacked([field.center for field in fields])
    return values.double() * stacked([field.deviation for field in fields]) + mean


def _padding(term: Term) -> int:
    if term.loss.ignore_index is None:
        raise ContractError(
            term.label,
            f"target {term.targets[0].name!r} holds lists of different lengths",
            "use cross_entropy, nll or ctc, or lists of one fixed size",
        )
    return term.loss.ignore_index


def _floating(column: Tensor) -> Tensor:
    """Numbers as they are, codes of categories as float32."""
    return column if column.is_floating_point() else column.float()


def _around(values: Tensor, blank: int | None) -> Tensor:
    """Token numbers with the blank's number left free."""
    return values if blank is None else values + (values >= blank).to(values.dtype)


def _is_numeric(field: Field) -> bool:
    return all(
        isinstance(value, int | float) and not isinstance(value, bool)
        for value in field.vocabulary or ()
    )


def _labels(field: Field, codes: Tensor) -> list[Any]:
    """The column's own values for class numbers."""
    vocabulary = field.vocabulary
    return [vocabulary[code] if vocabulary else code for code in codes.tolist()]


def _some(field: Field) -> str:
    values = [repr(value) for value in (field.vocabulary or ())[:4]]
    return ", ".join(values) + (", ..." if len(field.vocabulary or ()) > 4 else "")


def _unmeant(label: str, name: str, target: Tensor, expected: str, fix: str) -> ContractError:
    """The error of a column whose values are not what is expected."""
    low, high = float(target.min()), float(target.max())
    problem = f"target {name!r} holds values from {low:g} to {high:g}{expected}"
    return ContractError(label, problem, fix)


def _as_it_is(field: Field, served: Tensor) -> dict[str, Any]:
    return {field.name: served.numpy() if served.dim() == 1 else served.tolist()}
