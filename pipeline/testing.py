"""Tests for custom losses and models: are they exact under any split, and differentiable?

from pipeline.testing import check_loss, check_model
check_loss("quantile", torch.randn(8), torch.randn(8), level=0.8)
check_model("my_net", {"age": [31.0, 47.5, 52.0, 28.0], "city": ["A", "B", "A", "C"]}, width=16)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from pipeline import registry
from pipeline.data.batch import Batch, num_rows, select
from pipeline.data.bind import fit_table
from pipeline.data.columns import encode
from pipeline.data.dataset import build_dataset
from pipeline.errors import ContractError, UsageError
from pipeline.losses.bind import Output
from pipeline.losses.contract import Loss, build, elements, rows
from pipeline.losses.modes import evaluating
from pipeline.losses.objective import Objective
from pipeline.probes import suspects, total
from pipeline.spec.data import Data
from pipeline.train.build import build_model

TOLERANCE = 1e-9  # float64; sums of the same numbers in another order


def check_loss(name: str, *arguments: Tensor, **options: Any) -> None:
    """Check the registered loss on predictions, then targets, each [N, ...] with N of 4 or more.

    Raises ContractError saying which part of the contract is broken: one number per row or
    element, no dependence of rows on each other, sums that add up over any split and order, zero
    for no rows, gradients that are those of the numbers.
    """
    entry = registry.losses[name]
    try:
        chosen = entry.options.model_validate(options).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        known = ", ".join(entry.options.model_fields) or "none"
        raise ContractError(name, f"option {key}: {first['msg']}", f"options: {known}") from None
    if odd := [type(a).__name__ for a in arguments if not isinstance(a, Tensor)]:
        fix = "give predictions, then targets, as tensors"
        raise ContractError(name, f"cannot be checked on a {odd[0]}", fix)
    if len({len(a) for a in arguments}) > 1:
        lengths = ", ".join(str(len(a)) for a in arguments)
        raise ContractError(name, f"was given {lengths} rows", "give as many of each")
    loss = build(entry, chosen)
    if loss.head is not None:
        raise ContractError(name, "owns its parameters", "check it as part of a job instead")
    doubles = [a.double() if a.is_floating_point() else a for a in arguments]
    num_predictions = len(loss.roles)
    if len(doubles) < num_predictions or len(doubles[0]) < 4:
        wanted = ", ".join(role.name for role in loss.roles)
        raise ContractError(name, "too little to check", f"give {wanted} and targets of 4 rows")
    predictions = doubles[:num_predictions]
    targets = doubles[num_predictions:]
    if loss.module is not None:
        loss.module.double()
    if loss.per_batch:
        _check_whole(name, loss, predictions, targets)
        _check_gradient(name, loss, predictions, targets)
        return
    items = loss.items(*doubles)
    _check_items(name, items, doubles[0], targets)
    denominator = loss.denominator or _count(items, doubles[0])
    _check_parts(name, loss, denominator, predictions, targets)
    _check_gradient(name, loss, predictions, targets)


def _check_items(name: str, items: Tensor, prediction: Tensor, targets: list[Tensor]) -> None:
    sizes = {len(prediction), *(target.numel() for target in targets[:1])}
    if items.dim() == 0 or items.numel() not in sizes:
        raise ContractError(
            name,
            f"gives shape {list(items.shape)} for {len(prediction)} rows",
            "return one number per row or per target element, without .mean() or .sum()",
        )
    if not bool(torch.isfinite(items).all()):
        raise ContractError(name, "is not finite on these rows", "check logarithms and divisions")


def _check_whole(name: str, loss: Loss, predictions: list[Tensor], targets: list[Tensor]) -> None:
    """One finite number for the whole batch, in any order of its rows."""
    value = loss.items(*predictions, *targets)
    if value.dim() != 0:
        raise ContractError(
            name,
            f"is declared per batch, and gives shape {list(value.shape)}",
            "return the mean loss of all rows given, one number",
        )
    if not bool(torch.isfinite(value)):
        raise ContractError(name, "is not finite on these rows", "check logarithms and divisions")
    turned = loss.items(*(tensor.flip(0) for tensor in (*predictions, *targets)))
    one = float(value.detach())
    other = float(turned.detach())
    if abs(one - other) > TOLERANCE * max(1.0, abs(one)):
        raise ContractError(name, "depends on the order of the rows", "do not index by position")


def _count(items: Tensor, prediction: Tensor) -> Any:
    return rows if items.numel() == len(prediction) else elements


def _check_parts(
    name: str, loss: Loss, denominator: Any, predictions: list[Tensor], targets: list[Tensor]
) -> None:
    """Numerator and denominator over parts and in other orders."""
    num_rows_given = len(predictions[0])

    def parts(chosen: Tensor) -> tuple[float, float]:
        parts_of = [t[chosen] for t in targets]
        numerator = loss.items(*(p[chosen] for p in predictions), *parts_of).sum()
        counts = denominator(len(chosen), *parts_of)
        if counts.shape != (len(chosen),):
            raise ContractError(
                name,
                f"its denominator gives shape {list(counts.shape)} for {len(chosen)} rows",
                "return what each row adds to it: float64 [num_rows]",
            )
        return float(numerator.detach()), float(counts.sum())

    everything = torch.arange(num_rows_given)
    whole = parts(everything)
    for cut in (1, num_rows_given // 2, num_rows_given - 1):
        one = parts(everything[:cut])
        two = parts(everything[cut:])
        for what, left, right, both in zip(
            ("numerators", "denominators"), one, two, whole, strict=True
        ):
            if abs(left + right - both) > TOLERANCE * max(1.0, abs(both)):
                raise ContractError(
                    name,
                    f"{what} of rows 0 to {cut - 1} and of the others add up to "
                    f"{left + right:.6g}, together they give {both:.6g}: it couples rows",
                    "let each number depend on its own row alone",
                )
    turned = parts(everything.flip(0))
    if any(abs(a - b) > TOLERANCE * max(1.0, abs(b)) for a, b in zip(turned, whole, strict=True)):
        raise ContractError(name, "depends on the order of the rows", "do not index by position")
    empty = parts(everything[:0])
    if empty != (0.0, 0.0):
        raise ContractError(
            name, f"gives {empty[0]:g} over {empty[1]:g} for no rows", "a sum over nothing is 0"
        )


def _check_gradient(
    name: str, loss: Loss, predictions: list[Tensor], targets: list[Tensor]
) -> None:
    """Gradients of the predictions against differences of the numbers."""
    leaves = [p.detach().clone().requires_grad_() for p in predictions]
    try:
        torch.autograd.gradcheck(lambda *p: loss.items(*p, *targets).sum(), leaves)
    except (GradcheckError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no gradient"
        raise ContractError(
            name, f"its gradient is not that of its numbers: {reason}", "leave out .detach()"
        ) from None


def check_model(
    name: str,
    columns: Mapping[str, Sequence[Any] | Any],
    *,
    outputs: Mapping[str, int | None] | None = None,
    **options: Any,
) -> None:
    """Check the registered model on raw input columns of 4 rows or more, as a data file has them.

    Arrays of more than one dimension, as images [N, H, W], are tensors; lists are token sequences.
    `outputs` are the sizes of the outputs that losses would read, `{"prediction": None}` unless
    given (None: one number per row). Raises UsageError saying which part of the contract is broken:
    outputs by name with rows first and finite, rows that do not depend on each other or on their
    order, the same numbers for the same seed, no rows for no rows, a gradient for each parameter,
    and nothing learnt outside of parameters and buffers.
    """
    table = pa.table({name: _column(values) for name, values in columns.items()})
    fields = fit_table(Data(train="given"), table, {})
    rows = build_dataset(fields, encode(fields, table), table.num_rows, np.float32)
    batch = rows.gather(np.arange(table.num_rows))
    inputs = {field.name: field for field in fields}
    sizes = dict(outputs or {"prediction": None})
    wanted = {output: Output(output, size, "identity") for output, size in sizes.items()}

    def build() -> Objective:
        chosen = registry.models[name].options.model_validate(options).model_dump()
        torch.manual_seed(0)
        return Objective(build_model(name, inputs, wanted, chosen), inputs, [], sizes)

    def refuse(problem: str, fix: str) -> None:
        raise UsageError(f"model {name}: {problem}\n  fix: {fix}")

    if table.num_rows < 4:
        refuse(f"{table.num_rows} rows are too few to check it", "give columns of 4 rows or more")
    one = build()
    other = build()
    for suspect in suspects(one, batch, 2, times=50):
        refuse(suspect, "let a row's outputs follow from that row and torch's seed alone")
    _check_outputs(one, batch, sizes, refuse)
    idle = [n for n, p in one.named_parameters() if p.requires_grad and p.grad is None]
    if idle:
        refuse(f"no output depends on {', '.join(idle)}", "use them, or take them out")
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(torch.randn_like(parameter))
    other.load_state_dict(one.state_dict())
    if not _same(_predict(one, batch), _predict(other, batch)):
        refuse("its state is more than its state_dict", "keep it in parameters and buffers")


def _column(values: Any) -> Any:
    """A column of single values, or of tensors where each row is an array."""
    if isinstance(values, np.ndarray) and values.ndim > 1:
        return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(values))
    return values


def _predict(objective: Objective, batch: Batch) -> dict[str, Tensor]:
    with evaluating(objective), torch.no_grad():
        return objective.predict(batch)


def _check_outputs(
    objective: Objective, batch: Batch, sizes: dict[str, int | None], refuse: Any
) -> None:
    """Names and shapes of the outputs, of all rows, of none and in another order; gradients."""
    predictions = _predict(objective, batch)
    if missing := sorted(set(sizes) - set(predictions)):
        known = ", ".join(predictions)
        refuse(f"gives no output {missing[0]!r}, only {known}", "return it by name")
    for name, prediction in predictions.items():
        shape = list(prediction.shape)
        num_given = num_rows(batch)
        if not shape or shape[0] != num_given:
            refuse(f"output {name!r} has shape {shape} for {num_given} rows", "keep rows first")
        if not bool(torch.isfinite(prediction).all()):
            refuse(f"output {name!r} is not finite", "check logarithms and divisions")
    turned = torch.arange(num_rows(batch)).flip(0)
    again = _predict(objective, select(batch, turned))
    if not _same(again, {name: value[turned] for name, value in predictions.items()}):
        refuse("its outputs depend on the order of the rows", "do not index by position")
    try:
        nothing = _predict(objective, select(batch, turned[:0]))
    except Exception as error:  # a custom model can fail in any way
        refuse(f"fails on no rows: {error}", "let its operations take empty batches")
    else:
        if any(len(value) for value in nothing.values()):
            refuse("gives rows for no rows", "keep rows first")
    objective.zero_grad(set_to_none=True)
    total(objective, batch).backward()  # type: ignore[no-untyped-call]


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(
        torch.allclose(value, other[name], rtol=1e-4, atol=1e-6) for name, value in one.items()
    )
