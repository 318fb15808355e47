"""Losses of the time until something happens, where it is not always seen: `cox`, `hazards`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from pipeline.losses.contract import Loss, Role, register, rows
from pipeline.registry import lazy

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
else:
    torch = lazy("torch")
    F = lazy("torch.nn.functional")

Times = Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)]


@register("cox")
def cox(*, ties: Literal["efron", "breslow"] = "efron") -> Loss:
    """Proportional hazards, from one number a row: its log hazard, up to a constant.

    Minus the log partial likelihood of the global batch, whose rows are each other's risk sets,
    over its rows (Cox, Regression Models and Life-Tables, 1972; Efron, 1977, and Breslow, 1974,
    for equal times). The targets are the time and whether it happened then.
    """

    def items(prediction: Tensor, truth: Tensor) -> Tensor:
        time, order = truth[:, 0].sort(descending=True, stable=True)
        log_risk = prediction.double()[order]
        happened = truth[order, 1] > 0.5
        first = torch.searchsorted(-time, -time)  # of the rows with this time
        last = torch.searchsorted(-time, -time, right=True) - 1
        log_at_risk = log_risk.logcumsumexp(0)[last]
        terms = log_risk - log_at_risk
        if ties == "efron":
            share = torch.where(happened, terms.exp(), 0.0)  # of what is at risk then
            share = torch.zeros_like(share).index_add(0, last, share)[last]
            num_until = happened.long().cumsum(0)
            num_before = num_until[first] - happened[first].long()
            place = num_until - happened.long() - num_before  # among those of this time, from 0
            num_equal = (num_until[last] - num_before).clamp(min=1)
            terms = terms - torch.log1p(-share * place / num_equal)
        return -torch.where(happened, terms, 0.0).sum().to(prediction.dtype) / len(prediction)

    role = Role(kind="scores")
    return Loss(items, rows, (role,), "survival", "numbers", torch.exp, per_batch=True)


@register("hazards")
def hazards(*, times: Times) -> Loss:
    """Discrete time: one logit [N, times] for each stretch up to the next of `times`, which rise.

    It is that of the chance that it happens in the stretch, if not before (Gensheimer and
    Narasimhan, nnet-survival, 2019). What is not seen to its end counts for the stretches that were
    seen whole; later times count as not seen. Mean over rows. Serves the chance that nothing has
    happened at each of the times.
    """
    if sorted(set(times)) != times:
        raise ValueError(f"times must rise: {times}")

    def items(prediction: Tensor, truth: Tensor) -> Tensor:
        time, happened = truth[:, :1], truth[:, 1:] > 0.5
        ends = time.new_tensor(times)
        starts = torch.cat([ends.new_full((1,), -torch.inf), ends[:-1]])
        is_then = happened & (starts < time) & (time <= ends)
        is_over = torch.where(happened, ends < time, ends <= time)
        known = is_over * F.logsigmoid(-prediction) + is_then * F.logsigmoid(prediction)
        return -known.sum(1)

    def link(prediction: Tensor) -> Tensor:
        return F.logsigmoid(-prediction).cumsum(1).exp()

    role = Role(kind="logits", size=len(times))
    return Loss(items, rows, (role,), "survival", "rows", link, levels=tuple(times))
