"""Targets that are a time and whether something happened then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline.data.batch import Column
from pipeline.data.columns import Field
from pipeline.errors import ContractError
from pipeline.losses.targets.base import Items, Target, unmeant

if TYPE_CHECKING:
    from pipeline.losses.terms import Term
    from pipeline.metrics import Reads, Task


class Survival(Target):
    """Times, and 1 where something happened then, 0 where it was not seen: float64 [N, 2]."""

    name = "survival"
    sets_prediction_width = False
    needs_float64 = True

    def arguments(
        self, term: Term, columns: list[Column], prediction: Tensor | None
    ) -> list[Column]:
        both = zip(columns, term.targets, strict=True)
        read = [self._padded(term, column, field).double() for column, field in both]
        return [torch.stack(read, dim=1)]

    def check_fields(self, label: str, fields: Sequence[Field]) -> None:
        super().check_fields(label, fields)
        if len(fields) != 2:
            raise ContractError(
                label,
                f"reads two targets, a time and whether it happened then; found {len(fields)}",
                "name both in this order, as `target: [days, died]`",
            )
        time, happened = fields
        if not time.is_amount:
            problem = f"target {time.name!r} is {time.arrow_type}, expected times as numbers"
            raise ContractError(label, problem, "name the time first, then whether it happened")
        if happened.vocabulary is not None and len(happened.vocabulary) > 2:
            problem = f"target {happened.name!r} has more than two values"
            raise ContractError(label, problem, "store what happened as 0 and 1")

    def check_values(self, label: str, name: str, target: Tensor) -> None:
        if float(target[:, 0].min()) < 0:
            raise unmeant(label, name, target[:, 0], ", times are at least 0", "correct the rows")
        happened = target[:, 1]
        if not bool(((happened == 0) | (happened == 1)).all()):
            problem = f"the target after {name!r} holds other values than 0 and 1"
            raise ContractError(label, problem, "store what happened as 0 and 1")

    def task(self, term: Term) -> Task | None:
        return "survival"

    def readable(self, term: Term) -> tuple[Reads, ...]:
        return ("risks",)

    def usual_metrics(self, term: Term) -> tuple[str, ...]:
        return ("concordance",)

    def compared(self, term: Term, rows: Items, reads: Reads, centered: bool) -> Items:
        served, truth, weight, row = rows
        risk = -served.sum(1) if served.dim() > 1 else served
        return Items(risk, truth, weight, row)

    def constant(self, term: Term, reads: Reads, centered: bool) -> Tensor | None:
        return torch.zeros((), dtype=torch.float64)

    def nothing(self, term: Term, width: int, reads: Reads) -> tuple[Tensor, Tensor]:
        return torch.zeros(0), torch.zeros(0, 2)

    def decode(self, term: Term, served: Tensor) -> dict[str, Any]:
        time = term.targets[0].name
        if served.dim() == 1:
            return {f"{time}_risk": served.numpy()}
        columns = zip(term.loss.levels, served.unbind(1), strict=True)
        return {f"{time}_survival_{at:.15g}": chance.numpy() for at, chance in columns}
