"""Buffers that forward passes change, and whether their changes add up over rows."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from pipeline.data.batch import Batch, num_rows, select
from pipeline.errors import UsageError
from pipeline.losses.objective import Objective
from pipeline.probes.calls import kept_buffers, without_dropout

MAX_ROWS = 16
ADDS_RTOL = 1e-5
"""What rounding may leave between the change by all rows and those by two parts of them."""


def changing_buffers(objective: Objective, batch: Batch) -> dict[str, bool]:
    """Names of the buffers that a forward pass changes, and whether they add up over rows.

    Tried on a copy, in float64 if it can be. BatchNorm's are known to be means.
    Raises UsageError with the name of a sparse buffer that changes: workers could not share it.
    """
    norms = [m for m in objective.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    known = {id(buffer) for norm in norms for buffer in norm.buffers(recurse=False)}
    names = [name for name, buffer in objective.named_buffers() if id(buffer) not in known]
    for in_float64 in (True, False) if names else ():
        try:
            tried = _copy(objective, in_float64)
            with without_dropout(tried):
                return _try_parts(tried, batch, names)
        except UsageError:
            raise
        except Exception:  # it takes no float64, or no such part of a batch
            continue
    return {}


def _try_parts(objective: Objective, batch: Batch, names: list[str]) -> dict[str, bool]:
    """What `changing_buffers` says of the buffers that are named.

    One that adds up changes by all rows as by two parts of them together, at first and later too: a
    moving average does so from zeros only.
    """
    rows = torch.arange(min(num_rows(batch), MAX_ROWS))
    is_sum = dict.fromkeys(_changes(objective, batch, names, rows), len(rows) > 1)
    if not any(is_sum.values()):
        return is_sum
    for is_later in (False, True):
        if is_later:
            _forward(objective, batch, rows)
        parts = rows, *rows.tensor_split(2)
        whole, one, other = (_changes(objective, batch, names, part) for part in parts)
        for name in is_sum:
            is_known = name in whole and name in one and name in other
            is_sum[name] &= is_known and _is_sum(whole[name], one[name], other[name])
    return is_sum


def _copy(objective: Objective, in_float64: bool) -> Objective:
    """The objective in training; itself where it cannot be copied."""
    try:
        tried = copy.deepcopy(objective)
    except Exception:  # as of a weight that is made before each call
        return objective
    if in_float64:
        tried.widen()
    elif tried.precision == torch.bfloat16:
        tried.precision = torch.float32
    return tried


def _forward(objective: Objective, batch: Batch, rows: Tensor) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        objective.predict(select(batch, rows))


def _changes(
    objective: Objective, batch: Batch, names: list[str], rows: Tensor
) -> dict[str, Tensor]:
    """How much a forward pass changes each buffer that keeps its shape; they stay as before."""
    before = {name: objective.get_buffer(name).detach().clone() for name in names}
    with kept_buffers(objective):
        _forward(objective, batch, rows)
        now = dict(objective.named_buffers())
        changes = {}
        for name, then in before.items():
            if name not in now or now[name].shape != then.shape:
                continue
            if then.layout != torch.strided:
                if not torch.equal(now[name].to_dense(), then.to_dense()):
                    raise UsageError(
                        f"model: buffer {name} is sparse, and the forward pass changes it, which "
                        "workers cannot share: register it dense"
                    )
            elif not torch.equal(now[name], then):
                wide = torch.complex128 if then.is_complex() else torch.float64
                changes[name] = now[name].detach().to(wide) - then.to(wide)
    return changes


def _is_sum(whole: Tensor, one: Tensor, other: Tensor) -> bool:
    """Whether the change by all rows is the sum of those by two parts."""
    if not bool(whole.isfinite().all()):
        return False
    return bool(((one + other - whole).abs() <= ADDS_RTOL * whole.abs().max()).all())
