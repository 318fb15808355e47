"""For the tests of own losses: is it exact under any split, and differentiable?

from pipeline.testing import check_loss
check_loss("quantile", torch.randn(8), torch.randn(8), level=0.8)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from pipeline import registry
from pipeline.errors import ContractError
from pipeline.losses.contract import Loss, build, elements, rows

TOLERANCE = 1e-9  # float64; sums of the same numbers in another order


def check_loss(name: str, *arguments: Tensor, **options: Any) -> None:
    """Check the registered loss on predictions, then targets, each [N, ...] with N of 4 or more.

    Raises ContractError saying which part of the contract is broken: one number per row or
    element, no dependence of rows on each other, sums that add up over any split and order, zero
    for no rows, gradients that are those of the numbers.
    """
    entry = registry.losses[name]
    chosen = entry.options.model_validate(options).model_dump()
    loss = build(entry, chosen)
    if loss.head is not None:
        raise ContractError(name, "owns its parameters", "check it as part of a job instead")
    given = [a.double() if a.is_floating_point() else a for a in arguments]
    num_predictions = len(loss.roles)
    if len(given) < num_predictions or len(given[0]) < 4:
        wanted = ", ".join(role.name for role in loss.roles)
        raise ContractError(name, "too little to check", f"give {wanted} and targets of 4 rows")
    predictions, targets = given[:num_predictions], given[num_predictions:]
    if loss.module is not None:
        loss.module.double()
    if loss.per_batch:
        _check_whole(name, loss, predictions, targets)
        _check_gradient(name, loss, predictions, targets)
        return
    items = loss.items(*given)
    _check_items(name, items, given[0], targets)
    denominator = loss.denominator or _counted(items, given[0])
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
            name, f"is declared per batch, and gives shape {list(value.shape)}",
            "return the mean loss of all rows given, one number",
        )  # fmt: skip
    if not bool(torch.isfinite(value)):
        raise ContractError(name, "is not finite on these rows", "check logarithms and divisions")
    turned = loss.items(*(tensor.flip(0) for tensor in (*predictions, *targets)))
    one, other = float(value.detach()), float(turned.detach())
    if abs(one - other) > TOLERANCE * max(1.0, abs(one)):
        raise ContractError(name, "depends on the order of the rows", "do not index by position")


def _counted(items: Tensor, prediction: Tensor) -> Any:
    return rows if items.numel() == len(prediction) else elements


def _check_parts(
    name: str, loss: Loss, denominator: Any, predictions: list[Tensor], targets: list[Tensor]
) -> None:
    """Numerator and denominator over parts and in other orders."""
    number = len(predictions[0])

    def parts(chosen: Tensor) -> tuple[float, float]:
        kept = [t[chosen] for t in targets]
        numerator = loss.items(*(p[chosen] for p in predictions), *kept).sum()
        counts = denominator(len(chosen), *kept)
        if counts.shape != (len(chosen),):
            raise ContractError(
                name,
                f"its denominator gives shape {list(counts.shape)} for {len(chosen)} rows",
                "return what each row adds to it: float64 [num_rows]",
            )
        return float(numerator.detach()), float(counts.sum())

    everything = torch.arange(number)
    whole = parts(everything)
    for cut in (1, number // 2, number - 1):
        one, two = parts(everything[:cut]), parts(everything[cut:])
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
