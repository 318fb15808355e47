"""Targets that are amounts: numbers in a unit of their own, which may be scaled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline.data.columns import Field
from pipeline.errors import ContractError
from pipeline.losses.targets.base import Items, Target, as_it_is, of_items, some_of, unmeant

if TYPE_CHECKING:
    from pipeline.losses.terms import Term
    from pipeline.metrics import Reads, Task


class Amounts(Target):
    """Numbers in a column's own unit, which may be scaled."""

    is_amount = True

    def task(self, term: Term) -> Task | None:
        return "values"

    def readable(self, term: Term) -> tuple[Reads, ...]:
        return ("amounts",)

    def usual_metrics(self, term: Term) -> tuple[str, ...]:
        return "r2", "rmse", "mae", "median_absolute_error"

    def compared(self, term: Term, rows: Items, reads: Reads, centered: bool) -> Items:
        both = (unscaled(term.targets, values, centered) for values in rows[:2])
        prediction, truth = (values.reshape(len(values), -1) for values in both)
        return Items(prediction, truth, of_items(rows.weight, truth), of_items(rows.row, truth))

    def constant(self, term: Term, reads: Reads, centered: bool) -> Tensor | None:
        if not all(field.is_amount for field in term.targets):
            return None
        means = [torch.tensor(field.center, dtype=torch.float64) for field in term.targets]
        mean = torch.cat([part.flatten() for part in means])
        return torch.zeros_like(mean) if centered else mean

    def nothing(self, term: Term, width: int, reads: Reads) -> tuple[Tensor, Tensor]:
        shape = term.targets[0].shape if len(term.targets) == 1 else (len(term.targets),)
        numbers = torch.zeros(0, math.prod(shape))
        return numbers, numbers

    def in_units(self, term: Term, served: Tensor) -> Tensor:
        are_amounts = term.targets and all(field.is_amount for field in term.targets)
        return unscaled(term.targets, served) if are_amounts else served

    def decode_one(self, field: Field, served: Tensor) -> dict[str, Any]:
        return as_it_is(field, unscaled([field], served) if field.is_amount else served)


class AnyTarget(Amounts):
    """What a custom loss reads that does not say it: the column as it is stored."""

    name, is_declared = "any", False

    def read(self, column: Tensor, field: Field) -> Tensor:
        return field.numbers(column)

    def task(self, term: Term) -> Task | None:
        are_numbers = all(field.is_single and field.is_amount for field in term.targets)
        return "values" if term.targets and are_numbers else None


class Values(Amounts):
    """Numbers: float32."""

    name = "values"

    def check_field(self, label: str, field: Field) -> None:
        if field.vocabulary is not None and not _is_numeric(field):
            raise ContractError(
                label,
                f"target {field.name!r} holds {some_of(field)}, the loss needs numbers",
                "for classes use cross_entropy, for two classes bce_with_logits",
            )


class Counts(Values):
    """Whole numbers from 0: float32."""

    name, is_amount = "counts", False

    def readable(self, term: Term) -> tuple[Reads, ...]:
        return "amounts", "rates"

    def usual_metrics(self, term: Term) -> tuple[str, ...]:
        return *super().usual_metrics(term), "poisson_deviance"

    def check_values(self, label: str, name: str, target: Tensor) -> None:
        if float(target.min()) < 0:
            fix = "use mse or huber for other amounts"
            raise unmeant(label, name, target, ", counts are at least 0", fix)


MEDIAN = 0.5
"""The level of the quantile that is a prediction of the amount."""


class Quantiles(Values):
    """Numbers of which several quantiles are predicted: float32."""

    name = "quantiles"
    sets_prediction_width = False

    def check_fields(self, label: str, fields: Sequence[Field]) -> None:
        super().check_fields(label, fields)
        if len(fields) > 1 or not fields[0].is_single:
            problem = "predicts quantiles of one target, a single number in each row"
            raise ContractError(label, problem, "give each target a loss of its own")

    def readable(self, term: Term) -> tuple[Reads, ...]:
        return ("amounts", "quantiles") if MEDIAN in term.loss.levels else ("quantiles",)

    def usual_metrics(self, term: Term) -> tuple[str, ...]:
        of_median = ("mae", "r2") if MEDIAN in term.loss.levels else ()
        return "pinball_loss", "coverage", *of_median

    def compared(self, term: Term, rows: Items, reads: Reads, centered: bool) -> Items:
        if reads == "amounts":
            served = rows.prediction
            middle = served[:, term.loss.levels.index(MEDIAN)] if served.dim() == 2 else served
            return super().compared(term, rows._replace(prediction=middle), reads, centered)
        prediction, truth = (unscaled(term.targets, values) for values in rows[:2])
        level = prediction.new_tensor(term.loss.levels).expand_as(prediction)
        truth = truth[:, None].expand_as(prediction)
        weight, row = of_items(rows.weight, truth), of_items(rows.row, truth)
        return Items(torch.stack([prediction, level], dim=2), truth, weight, row)

    def constant(self, term: Term, reads: Reads, centered: bool) -> Tensor | None:
        return super().constant(term, reads, centered) if reads == "amounts" else None

    def nothing(self, term: Term, width: int, reads: Reads) -> tuple[Tensor, Tensor]:
        if reads == "amounts":
            return super().nothing(term, width, reads)
        num_levels = len(term.loss.levels)
        return torch.zeros(0, num_levels, 2), torch.zeros(0, num_levels)

    def decode(self, term: Term, served: Tensor) -> dict[str, Any]:
        name, amounts = term.targets[0].name, unscaled(term.targets, served)
        columns = zip(term.loss.levels, amounts.unbind(1), strict=True)
        quantiles = {f"{name}_quantile_{level:.15g}": amount.numpy() for level, amount in columns}
        if MEDIAN not in term.loss.levels:
            return quantiles
        return {name: amounts[:, term.loss.levels.index(MEDIAN)].numpy()} | quantiles


def unscaled(fields: Sequence[Field], values: Tensor, centered: bool = False) -> Tensor:
    """Values in the unit of the target columns, float64; `centered`, less their training mean."""

    def stacked(amounts: list[Any]) -> Any:
        if len(amounts) == 1 and isinstance(amounts[0], float):
            return amounts[0]
        tensor = values.new_tensor(amounts, dtype=torch.float64)
        return tensor[0] if len(amounts) == 1 else tensor

    mean = stacked([field.mean for field in fields])
    center = stacked([field.center for field in fields]) if centered else 0.0
    are_logs = [field.log for field in fields]
    if not any(are_logs):  # one subtraction, before large means cancel
        mean, center = mean - center, 0.0
    amounts: Tensor = values.double() * stacked([field.deviation for field in fields]) + mean
    if all(are_logs):
        amounts = amounts.expm1()
    elif any(are_logs):
        amounts = torch.where(values.new_tensor(are_logs).bool(), amounts.expm1(), amounts)
    return amounts - center


def _is_numeric(field: Field) -> bool:
    return all(
        isinstance(value, int | float) and not isinstance(value, bool)
        for value in field.vocabulary or ()
    )
