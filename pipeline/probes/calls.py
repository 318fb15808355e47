"""Calls of modules, kept while a batch passes through the model, to be made again."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.data.batch import Batch, Ragged, to_float64
from pipeline.losses.modes import evaluating
from pipeline.losses.objective import Objective

Found = list[tuple[str, str]]
"""Components and their faults."""


@dataclass(frozen=True)
class Call:
    """What a module was given for some rows, to be given again."""

    name: str
    module: nn.Module
    arguments: Any
    precision: torch.dtype

    @property
    def title(self) -> str:
        """Path and class of the module, for messages."""
        return f"{self.name or 'model'} ({type(self.module).__name__})"

    @property
    def given(self) -> list[Tensor]:
        """The tensors it was given."""
        return tensors(self.arguments)

    def again(
        self, seed: int, is_by_row: list[bool] | None = None, rows: Tensor | None = None
    ) -> list[Tensor]:
        """What it gives from the same buffers with this seed; for these `rows`.

        `is_by_row` tells for each tensor given whether its first dimension is that of the rows.
        """
        with torch.no_grad():
            return self._call(seed, iter(is_by_row or []), rows)[0]

    def gradients(
        self,
        seed: int,
        of: Callable[[Tensor, int], Tensor],
        is_by_row: list[bool] | None = None,
        rows: Tensor | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients of its parameters and inputs, for the gradients `of` its outputs."""
        trained = [p for p in self.module.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.grad = None
        with torch.enable_grad():
            outputs, leaves = self._call(seed, iter(is_by_row or []), rows)
            parts = [(t * of(t, index)).sum() for index, t in enumerate(outputs) if t.requires_grad]
            if parts:
                torch.stack([part.real for part in parts]).sum().backward()  # type: ignore[no-untyped-call]
        of_weights = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trained]
        for parameter in trained:
            parameter.grad = None
        of_inputs = [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]
        return of_weights, of_inputs

    def _call(
        self, seed: int, flags: Iterator[bool], rows: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs, and the leaves that it was given copies of."""
        leaves: list[Tensor] = []

        def taken(tensor: Tensor) -> Tensor:
            is_cut = next(flags, False)
            leaf = (tensor[rows] if is_cut and rows is not None else tensor).detach().clone()
            if leaf.is_floating_point() and torch.is_grad_enabled():
                leaves.append(leaf.requires_grad_())
            return leaf.clone()  # a module may write into it

        arguments, keywords = mapped(self.arguments, taken)
        low = self.precision == torch.bfloat16
        with kept_buffers(self.module):
            torch.manual_seed(seed)
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                outputs = tensors(self.module(*arguments, **keywords))
        return outputs, leaves


Passed = dict[str, tuple[Call, list[Tensor]]]
"""Each module's call and what it gave, by the module's path."""


def passed(objective: Objective, batch: Batch, seed: int = 0) -> Passed:
    """The first call of every module in one forward pass, in the order in which they end."""
    arguments_of: dict[str, Any] = {}
    ended: Passed = {}

    def before(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, arguments: Any, keywords: Any) -> None:
            arguments_of.setdefault(name, mapped((arguments, keywords), torch.clone))

        return keep

    def after(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, arguments: Any, keywords: Any, output: Any) -> None:
            if name not in ended:
                call = Call(name, module, arguments_of[name], objective.precision)
                ended[name] = call, [tensor.detach().clone() for tensor in tensors(output)]

        return keep

    handles = []
    for name, module in objective.model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
            continue
        handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(module.register_forward_hook(after(name), with_kwargs=True))
    try:
        with kept_buffers(objective), torch.no_grad():
            torch.manual_seed(seed)
            objective.predict(dict(batch))  # which can be taken apart into tensors
    finally:
        for handle in handles:
            handle.remove()
    return ended


def first_to_differ(one: Passed, other: Passed) -> Call | None:
    """The innermost module that was given the same and gave something else."""
    for name, (call, outputs) in one.items():
        is_odd = name in other and not equal(outputs, other[name][1])
        if is_odd and equal(call.given, other[name][0].given):
            return call
    return None


def total(objective: Objective, batch: Batch) -> Tensor:
    """The sum of all numerators, or of all outputs where there is no loss."""
    if objective.terms:
        numerators: Tensor = objective(batch)[0]
        return numerators.sum()
    return torch.stack([value.sum() for value in objective.predict(batch).values()]).sum()


def in_float64(objective: Objective, batch: Batch) -> Objective:
    """A copy of it in float64 with its gradient hooks; itself where it cannot be one."""
    try:
        wide = copy.deepcopy(objective)
        wide.widen()
        for wide_parameter, own in zip(wide.parameters(), objective.parameters(), strict=True):
            for hook in hooks(own):
                wide_parameter.register_hook(hook)  # type: ignore[no-untyped-call]
            for hook in (own._post_accumulate_grad_hooks or {}).values():
                wide_parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        with kept_buffers(wide), torch.no_grad():
            wide(to_float64(batch)) if wide.terms else wide.predict(batch)
    except Exception:  # a user's model can fail in any way where it was not meant to run
        return objective
    return wide


def hooks(parameter: Tensor) -> list[Callable[[Tensor], Any]]:
    """What the user lets act on the gradient of a parameter while it is computed."""
    return list((parameter._backward_hooks or {}).values())


@contextmanager
def kept_buffers(module: nn.Module) -> Iterator[None]:
    """The buffers are afterwards as they were before, except for those of another shape."""
    named = module.named_buffers()
    before = {name: b.detach().clone() for name, b in named if b.layout == torch.strided}
    try:
        yield
    finally:
        for name, buffer in module.named_buffers():
            value = before.get(name)
            if value is not None and value.shape == buffer.shape and not torch.equal(value, buffer):
                buffer.detach().copy_(value)


@contextmanager
def mode(module: nn.Module, training: bool) -> Iterator[None]:
    """The module as it is trained, or in evaluation."""
    with nullcontext() if training else evaluating(module):
        yield


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value) if value.dim() else value
    if isinstance(value, Ragged):
        return Ragged(change(value.values), change(value.lengths))
    if isinstance(value, dict):
        copied = copy.copy(value)  # of its own class
        copied.update({key: mapped(item, change) for key, item in value.items()})
        return copied
    if isinstance(value, list | tuple):
        items = [mapped(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def tensors(value: Any) -> list[Tensor]:
    """All tensors of a structure that have a dimension."""
    leaves: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        leaves.append(tensor)
        return tensor

    mapped(value, keep)
    return leaves


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    """The same shapes and bits; NaN is like NaN."""
    return len(one) == len(other) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
        for a, b in zip(one, other, strict=True)
    )


def close(one: Tensor, other: Tensor, rtol: float) -> bool:
    """The same shapes, and numbers up to `rtol`, or a hundredth of it of the largest."""
    if one.shape != other.shape:
        return False
    scale = float(other.abs().max()) if other.numel() else 0.0
    atol = rtol / 100 * max(scale, 1e-30) if math.isfinite(scale) else 0.0
    return torch.allclose(one, other, rtol=rtol, atol=atol, equal_nan=True)


def gradients_of(objective: Objective, batch: Batch, scale: float = 1.0) -> dict[str, Tensor]:
    """Gradients of `scale` times the loss, by parameter, in the order of the model."""
    objective.zero_grad(set_to_none=True)
    with kept_buffers(objective):
        torch.manual_seed(1)
        loss = total(objective, batch) * scale
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
    gradients = {n: p.grad.clone() for n, p in objective.named_parameters() if p.grad is not None}
    objective.zero_grad(set_to_none=True)
    return {name.removeprefix("model."): gradient for name, gradient in gradients.items()}


@contextmanager
def without_dropout(module: nn.Module) -> Iterator[None]:
    """The module with its dropouts off: they would hide how rows depend on each other."""
    off = [m for m in module.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
    modes = [m.training for m in off]
    for m in off:
        m.eval()
    try:
        yield
    finally:
        for m, was_training in zip(off, modes, strict=True):
            m.training = was_training
