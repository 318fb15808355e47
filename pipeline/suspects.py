"""Which component breaks a promise: found by asking each one by itself, on real rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.data.batch import Batch, Ragged, num_rows, select
from pipeline.losses.objective import Objective

MOST_ROWS = 61  # odd, so that it is hardly the size of another dimension


@dataclass(frozen=True)
class Suspect:
    """A component, and what it does that no exact run can bear."""

    component: str
    fault: str

    def __str__(self) -> str:
        return f"{self.component}: {self.fault}"


@dataclass(frozen=True)
class _Call:
    """What a module was given for some rows, to be given again."""

    name: str
    module: nn.Module
    arguments: Any
    precision: torch.dtype

    def again(self, seed: int, rows: list[bool] | None = None, end: int | None = None) -> Any:
        """What it gives from the same buffers with this seed; of the first `end` rows.

        `rows` tells for each tensor given whether its first dimension is that of the rows.
        """
        buffers = [buffer.clone() for buffer in self.module.buffers()]
        flags = iter(rows or [])

        def taken(tensor: Tensor) -> Tensor:
            return tensor[:end].clone() if next(flags, False) else tensor.clone()

        arguments, keywords = _mapped(self.arguments, taken)
        torch.manual_seed(seed)
        low = self.precision == torch.bfloat16
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
            given = self.module(*arguments, **keywords)
        for buffer, value in zip(self.module.buffers(), buffers, strict=True):
            buffer.copy_(value)
        return _tensors(given)

    @property
    def title(self) -> str:
        return f"{self.name or 'model'} ({type(self.module).__name__})"


def draws(objective: Objective, batch: Batch) -> bool:
    """Whether the model draws random numbers, as dropout does: these follow the micro-batch."""
    model = _calls(objective, dict(batch))[""]
    return not _equal(model.again(1), model.again(2))


def suspects(objective: Objective, batch: Batch, microbatch_size: int) -> list[Suspect]:
    """Components that depend on more than their rows and the seed; innermost modules first.

    `batch` is a whole global batch, on the CPU; it is cut as the step would cut it.
    """
    batch = dict(batch)  # which the calls below can be taken apart into tensors
    found: list[Suspect] = []
    blamed: set[str] = set()
    few = select(batch, torch.arange(min(num_rows(batch), MOST_ROWS)))
    fewer = {}
    if num_rows(few) > 1:
        fewer = _calls(objective, select(batch, torch.arange(num_rows(few) - 1)))
    for name, call in _calls(objective, few).items():  # innermost first, as they end
        if any(inner.startswith(f"{name}.") or not name for inner in blamed):
            continue
        fault = _fault(call, fewer.get(name), num_rows(few))
        if fault:
            blamed.add(name)
            found.append(Suspect(call.title, fault))
    found += _losses(objective, batch, microbatch_size)
    if not found and not _same_gradients(objective, few):
        fault = "its backward pass gives other bits for the same rows and seed"
        found.append(Suspect("model", fault))
    return found


def _fault(call: _Call, fewer: _Call | None, rows: int) -> str | None:
    """What is wrong with one module, if anything; `fewer` is its call with one row less."""
    first = call.again(1)
    if not _equal(first, call.again(1)):
        return "gives other numbers for the same rows and the same seed"
    if fewer is None:
        return None
    given, other = _tensors(call.arguments), _tensors(fewer.arguments)
    flags = [a.dim() > 0 and len(a) != len(b) for a, b in zip(given, other, strict=False)]
    by_row = len(given) == len(other) and all(len(t) == rows for t in first if t.dim())
    with _without_dropout(call.module):
        first = call.again(1)
        if not by_row or not any(flags) or not _equal(first, call.again(2)):
            return None  # it draws random numbers, or its rows are not to be told
        try:
            half = call.again(1, flags, rows // 2)
        except Exception:  # a module that takes no other number of rows cannot be asked
            return None
    rtol = 0.02 if call.precision == torch.bfloat16 else 1e-3
    if all(_close(one, both[: rows // 2], rtol) for one, both in zip(half, first, strict=True)):
        return None
    is_norm = isinstance(call.module, nn.modules.batchnorm._BatchNorm)
    return "normalises by the statistics of one micro-batch" if is_norm else (
        "gives a row other numbers when other rows are beside it"
    )  # fmt: skip


@contextmanager
def _without_dropout(module: nn.Module) -> Iterator[None]:
    """The module with its dropouts off: they would hide how rows depend on each other."""
    off = [m for m in module.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
    modes = [m.training for m in off]
    for m in off:
        m.eval()
    try:
        yield
    finally:
        for m, mode in zip(off, modes, strict=True):
            m.train(mode)


def _losses(objective: Objective, batch: Batch, size: int) -> list[Suspect]:
    """Losses whose items or denominator of a row depend on the rows beside it."""
    found = []
    objective.eval()
    with torch.no_grad():
        predictions = objective.predict(batch)
    objective.train()
    rows = torch.arange(num_rows(batch))
    pieces = torch.split(rows, size)
    for number, term in enumerate(objective.terms):
        if term.loss.per_batch:
            continue

        def counts(chosen: Tensor, seed: int = 1, of: int = number) -> Tensor:
            torch.manual_seed(seed)
            return objective.terms[of].denominator(select(batch, chosen))

        def items(chosen: Tensor, seed: int = 1, of: int = number) -> Tensor:
            kept = {name: value[chosen] for name, value in predictions.items()}
            torch.manual_seed(seed)
            with torch.no_grad():
                given = objective.items_of(of, kept, select(batch, chosen))
            return given.reshape(len(chosen), -1)

        for ask, what in ((counts, "the denominator"), (items, "the loss")):
            whole = ask(rows)
            if not _equal([whole], [ask(rows)]):
                fault = f"{what} of a row is another one each time"
            elif not _equal([whole], [ask(rows, 2)]):
                continue  # it draws random numbers, which follow the micro-batch
            elif not _close(torch.cat([ask(piece) for piece in pieces]), whole, 1e-3):
                fault = f"{what} of a row depends on the rows beside it"
            else:
                continue
            found.append(Suspect(f"loss {term.label}", fault))
    return found


def _same_gradients(objective: Objective, batch: Batch) -> bool:
    """Whether forward and backward give the same bits twice, from the same buffers."""

    def gradients() -> list[Tensor]:
        buffers = [buffer.clone() for buffer in objective.buffers()]
        objective.zero_grad(set_to_none=True)
        torch.manual_seed(1)
        total(objective, batch).backward()  # type: ignore[no-untyped-call]
        for buffer, value in zip(objective.buffers(), buffers, strict=True):
            buffer.detach().copy_(value)
        return [p.grad.clone() for p in objective.parameters() if p.grad is not None]

    return _equal(gradients(), gradients())


def total(objective: Objective, batch: Batch) -> Tensor:
    """The sum of all numerators, or of all outputs where there is no loss."""
    if objective.terms:
        numerators: Tensor = objective(batch)[0]
        return numerators.sum()
    return torch.stack([value.sum() for value in objective.predict(batch).values()]).sum()


def _calls(objective: Objective, batch: Batch) -> dict[str, _Call]:
    """The first call of every module in one forward pass, in the order in which they end."""
    given: dict[str, Any] = {}
    ended: dict[str, _Call] = {}

    def before(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, arguments: Any, keywords: Any) -> None:
            given.setdefault(name, _mapped((arguments, keywords), torch.clone))

        return keep

    def after(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, arguments: Any, keywords: Any, output: Any) -> None:
            ended.setdefault(name, _Call(name, module, given[name], objective.precision))

        return keep

    handles = []
    for name, module in objective.model.named_modules():
        handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(module.register_forward_hook(after(name), with_kwargs=True))
    buffers = [buffer.clone() for buffer in objective.buffers()]
    objective.train()
    torch.manual_seed(0)
    with torch.no_grad():
        objective.predict(batch)
        for buffer, value in zip(objective.buffers(), buffers, strict=True):
            buffer.copy_(value)
    for handle in handles:
        handle.remove()
    return ended


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value) if value.dim() else value
    if isinstance(value, Ragged):
        return Ragged(change(value.values), change(value.lengths))
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        made = [_mapped(item, change) for item in value]
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    return value


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _mapped(value, keep)
    return found


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    """The same shapes and bits; NaN is like NaN."""
    return len(one) == len(other) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
        for a, b in zip(one, other, strict=True)
    )


def _close(one: Tensor, other: Tensor, rtol: float) -> bool:
    if one.shape != other.shape:
        return False
    scale = float(other.abs().max()) if other.numel() else 0.0
    atol = rtol / 100 * max(scale, 1e-30) if math.isfinite(scale) else 0.0
    return torch.allclose(one, other, rtol=rtol, atol=atol, equal_nan=True)
