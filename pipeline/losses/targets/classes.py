"""Targets that are entries of a vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline.data.columns import IGNORED, Field
from pipeline.errors import ContractError
from pipeline.losses.targets.base import Items, Target, labels_of, of_items, some_of

if TYPE_CHECKING:
    from pipeline.losses.terms import Term
    from pipeline.metrics import Reads, Task

MAX_PROBABILITIES = 1000
"""With more classes than this, only the best class and its probability are served."""
MANY_CLASSES = 10
"""With more than these, it says something to have the true one among the first five."""
MOST_RANKED_CLASSES = 100
"""With more than these, each against the rest is asked for by name only."""


class Vocabulary(Target):
    """Numbers of a vocabulary's entries: int64."""

    is_class = True
    sets_prediction_width = False

    def read(self, column: Tensor, field: Field) -> Tensor:
        return column.long()

    def check_field(self, label: str, field: Field) -> None:
        if field.is_amount:
            problem = f"target {field.name!r} is {field.arrow_type}"
            raise ContractError(label, problem, "store the classes as text or integers")
        if field.is_single and field.num_codes < 2:
            raise ContractError(
                label,
                f"target {field.name!r} has one class only ({some_of(field)}): the loss would "
                "always be 0",
                "check data.target and the training rows",
            )


class Groups(Vocabulary):
    """Rows of one number belong together: int64."""

    name = "groups"


class Classes(Vocabulary):
    """Class numbers, or `ignore_index`: int64."""

    name = "classes"

    def task(self, term: Term) -> Task | None:
        return "classes"

    def readable(self, term: Term) -> tuple[Reads, ...]:
        of_labels: tuple[Reads, ...] = ("labels", "scores")
        return (*of_labels, "probabilities") if _has_probabilities(term) else of_labels

    def usual_metrics(self, term: Term) -> tuple[str, ...]:
        field, proper = term.targets[0], _has_probabilities(term)
        if not field.is_single:  # as of tokens
            return ("accuracy", "perplexity") if proper else ("accuracy",)
        names = ["accuracy", "balanced_accuracy", "f1"]
        names += ["log_loss"] if proper else []
        names += ["top_5_accuracy"] if field.num_codes > MANY_CLASSES else []
        if field.num_codes <= MOST_RANKED_CLASSES:
            names += ["roc_auc", "average_precision"]
        return *names, *(["calibration_error"] if proper else [])

    def compared(self, term: Term, rows: Items, reads: Reads, centered: bool) -> Items:
        is_counted = rows.truth != IGNORED
        served = rows.prediction.movedim(1, -1)[is_counted]
        prediction = served.argmax(1) if reads == "labels" else served
        weight, row = (of_items(p, rows.truth)[is_counted] for p in (rows.weight, rows.row))
        return Items(prediction, rows.truth[is_counted], weight, row)

    def constant(self, term: Term, reads: Reads, centered: bool) -> Tensor | None:
        counts = term.targets[0].counts
        if counts is None:
            return None
        shares = torch.tensor(counts, dtype=torch.float64) / sum(counts)
        return shares.argmax() if reads == "labels" else shares

    def nothing(self, term: Term, width: int, reads: Reads) -> tuple[Tensor, Tensor]:
        numbers = torch.zeros(0, dtype=torch.int64)
        return numbers if reads == "labels" else torch.zeros(0, width), numbers

    def decode(self, term: Term, served: Tensor) -> dict[str, Any]:
        if not term.targets or served.dim() != 2:
            return super().decode(term, served)
        field = term.targets[0]
        labels = labels_of(field, served.argmax(1))
        if served.shape[1] > MAX_PROBABILITIES:
            best = served.max(1).values.tolist()
            return {field.name: labels, f"{field.name}_probability": best}
        columns = served.unbind(1)
        kind = "probability" if _has_probabilities(term) else "score"
        named = zip(field.vocabulary or range(len(columns)), columns, strict=False)
        shares = {f"{field.name}_{kind}_{value}": column.numpy() for value, column in named}
        return {field.name: labels} | shares


def _has_probabilities(term: Term) -> bool:
    """Whether what is served for each class is its probability, not only a score."""
    return term.loss.link is not None
