"""Modules that are unsteady, couple rows, or draw random numbers where none are expected."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sized
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data.batch import Batch, num_rows, select
from pipeline.losses.objective import Objective
from pipeline.suspects.calls import (
    Call,
    close,
    equal,
    first_to_differ,
    hooks,
    kept_buffers,
    mode,
    passed,
    total,
)

Found = list[tuple[str, str]]
"""Components and their faults."""

SHAPE_RTOL = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.02}
"""What another number of rows may leave: some modules compute in float32 whatever they get."""
GRADIENT_RTOL = 0.1
"""Of sums of gradients in another order: parts of a model may compute in bfloat16."""
CONTENT_RTOL = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 0.02}
"""What other contents of as many rows may leave, which is nothing unless they change a shape."""
EXACT_RTOL = 1e-6
"""Of the same, where all parts compute in float64; other differences are looked into."""
MULTIPLE_RTOL = 1e-5
"""Of multiples of gradients by a power of 2, which rounds nothing."""
UNSTEADY = "gives different numbers for the same rows and seed"
OTHER_NUMBERS = "gives a row different numbers when other rows are beside it"
OTHER_GRADIENT = "gives a row a different gradient when other rows are beside it"
MANY = 4
"""Calls from which on a fault is called late."""
LARGE = 2.0**14
"""Times ordinary gradients: those that a clipping hook acts on."""


def draws(objective: Objective, batch: Batch, training: bool = True) -> str | None:
    """The module that draws random numbers, as dropout does; the innermost first."""
    with mode(objective, training):
        one, other, again = (passed(objective, batch, seed) for seed in (1, 2, 1))
    odd = first_to_differ(one, other)
    return odd.title if odd and first_to_differ(one, again) is None else None


def unsteady(objective: Objective, batch: Batch, times: int) -> Found:
    """What differs, within so many calls, for the same rows, weights, buffers and seed."""
    with mode(objective, training=True):
        names = dict(objective.model.named_modules())
        kept = {name: _attributes(module) for name, module in names.items()}
        if changed := rewritten(objective, batch):
            fault = f"writes its parameter `{changed}` in the forward pass, which no worker shares"
            return [("model", f"{fault}: keep it in a buffer")]
        first, gradients = passed(objective, batch, 1), _gradients(objective, batch)
        for number in range(2, times + 1):
            odd = first_to_differ(passed(objective, batch, 1), first)
            again = _gradients(objective, batch)
            other = [name for name, g in again.items() if not equal([g], [gradients.get(name, g)])]
            if other and odd is None:  # a counter in a module may have been reached in between
                odd = first_to_differ(passed(objective, batch, 1), first)
            if odd is not None:
                cause = _cause(objective, batch, odd, kept[odd.name])
                return [(odd.title, f"{UNSTEADY}{_from(number)}: {cause}")]
            if other:
                about = f"the gradient of {other[-1]} is different for the same rows and seed"
                return [("model", f"{about}{_from(number)}")]
    return []


def rewritten(objective: Objective, batch: Batch) -> str | None:
    """The parameter that a forward pass writes into; afterwards it is as before."""
    before = [(p.detach().clone(), p._version) for p in objective.model.parameters()]
    passed(objective, batch, 1)
    found, named = None, objective.model.named_parameters()
    for (name, parameter), (value, version) in zip(named, before, strict=True):
        if parameter._version != version or not equal([parameter.detach()], [value]):
            found = found or name
            parameter.data.copy_(value)
    return found


def _from(number: int) -> str:
    return " after many calls" if number >= MANY else ""


def _cause(objective: Objective, batch: Batch, odd: Call, before: dict[str, Any]) -> str:
    """Why a module is unsteady, as far as it can be told."""

    def is_steady(seeds: bool) -> bool:
        made = []
        for _ in range(2):
            if seeds:
                random.seed(0)
                np.random.seed(0)
            made.append(passed(objective, batch, 1))
        return first_to_differ(*made) is None

    if not is_steady(seeds=False) and is_steady(seeds=True):
        return "it draws from Python's or NumPy's random numbers; the pipeline seeds torch's"
    return _kept(before, odd.module)


def _kept(before: dict[str, Any], module: nn.Module) -> str:
    kept = ", ".join(f"`{key}`" for key in _changed(before, module))
    if not kept:
        return "it draws from a generator of its own, or keeps something from call to call"
    return f"it keeps {kept} from call to call, outside its parameters and buffers"


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What a module keeps besides parameters, buffers and modules, as far as it can be compared."""
    kept: dict[str, Any] = {}
    for key, value in vars(module).items():
        if key.startswith("_") and key[1:] in ("parameters", "buffers", "modules"):
            continue
        if isinstance(value, bool | int | float | str | None):
            kept[key] = value
        elif isinstance(value, Tensor):
            kept[key] = value.detach().clone()
        elif isinstance(value, torch.Generator):
            kept[key] = value.get_state()
        elif isinstance(value, np.random.Generator):
            kept[key] = repr(value.bit_generator.state)
        elif isinstance(value, random.Random):
            kept[key] = hash(value.getstate())
        elif isinstance(value, Sized) and not key.startswith("_"):
            kept[key] = len(value)
    return kept


def _changed(before: dict[str, Any], module: nn.Module) -> list[str]:
    """What the module keeps otherwise than before."""
    after = _attributes(module)

    def same(one: Any, other: Any) -> bool:
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            return equal([one], [other])
        return type(one) is type(other) and not isinstance(one, Tensor) and one == other

    return [key for key, value in before.items() if not same(value, after.get(key))]


def _gradients(objective: Objective, batch: Batch, scale: float = 1.0) -> dict[str, Tensor]:
    """Of `scale` times the loss, by parameter, in the order of the model."""
    objective.zero_grad(set_to_none=True)
    with kept_buffers(objective):
        torch.manual_seed(1)
        loss = total(objective, batch) * scale
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
    found = {n: p.grad.clone() for n, p in objective.named_parameters() if p.grad is not None}
    objective.zero_grad(set_to_none=True)
    return {name.removeprefix("model."): gradient for name, gradient in found.items()}


def coupled(objective: Objective, batch: Batch, size: int) -> Found:
    """Modules whose numbers or gradients for a row depend on the rows beside it.

    They are asked one by one where the model as a whole does so, as in micro-batches of `size`: a
    module may be given other things than rows, and its parts may make up for each other.
    """
    with mode(objective, training=True), without_dropout(objective.model):
        whole = _Whole(objective, batch, size)
        fault, is_sure = whole.numbers() or whole.gradients() or ("", False)
    found = _innermost(objective, batch) if fault else []
    return found or ([("model", fault)] if is_sure else [])


class _Whole:
    """How the numbers and gradients of a whole model depend on the other rows of a batch.

    Each answer is a fault, and whether the model has it if none of its modules has: one that draws
    random numbers can only be asked part by part.
    """

    def __init__(self, objective: Objective, batch: Batch, size: int) -> None:
        self.objective, self.batch, self.size = objective, batch, size
        self.rows = num_rows(batch)
        everything = torch.arange(self.rows)
        self.all, self.left, self.right = everything, *everything.tensor_split(2)

    def numbers(self) -> tuple[str, bool] | None:
        """Of rows in other batches: smaller ones, and as large with other rows beside them."""
        whole = self._predicted(self.all)
        if not equal(whole, self._predicted(self.all, seed=2)):
            return OTHER_NUMBERS, False
        parts = self.left, self.right, self.all[: self.size], self.all[-self.size :]
        alone = [self._predicted(part) for part in parts]
        shapes = [[tensor.shape[1:] for tensor in made] for made in (whole, *alone)]
        if any(shape != shapes[0] for shape in shapes) or any(len(t) != self.rows for t in whole):
            return None  # as of rows that are filled up to the longest: their losses are asked
        left, right = self.left, self.right
        others = (torch.cat([left, left, left])[: self.rows], torch.cat([right, right, right]))
        exchanged = [self._predicted(others[0]), self._predicted(others[1][-self.rows :])]
        precision = self.objective.precision
        pairs = [
            *(
                (made, whole, part, SHAPE_RTOL[precision])
                for made, part in zip(alone, parts, strict=True)
            ),
            ([t[: len(left)] for t in exchanged[0]], whole, left, CONTENT_RTOL[precision]),
            ([t[-len(right) :] for t in exchanged[1]], whole, right, CONTENT_RTOL[precision]),
        ]
        for made, known, part, rtol in pairs:
            if not all(close(a, b[part], rtol) for a, b in zip(made, known, strict=True)):
                return OTHER_NUMBERS, True
        return None

    def gradients(self) -> tuple[str, bool] | None:
        """Whether those of all rows are the sums of two parts, also when they are large."""
        if self.objective.is_coupled:  # its losses do not add up, and are not to
            return OTHER_GRADIENT, False
        for scale in (1.0, LARGE):
            both = zip(
                self._gradient(self.left, scale), self._gradient(self.right, scale), strict=True
            )
            summed, whole = [a + b for a, b in both], self._gradient(self.all, scale)
            if not _near(summed, whole, EXACT_RTOL, EXACT_RTOL):
                return OTHER_GRADIENT, not _near(summed, whole)
        return None

    def _predicted(self, chosen: Tensor, seed: int = 1) -> list[Tensor]:
        with kept_buffers(self.objective), torch.no_grad():
            torch.manual_seed(seed)
            made = self.objective.predict(select(self.batch, chosen))
        names = [name for term in self.objective.terms for name in term.outputs]
        return [made[name] for name in names or made]

    def _gradient(self, chosen: Tensor, scale: float) -> list[Tensor]:
        found = _gradients(self.objective, select(self.batch, chosen), scale)
        named = self.objective.named_parameters()
        return [found.get(name.removeprefix("model."), torch.zeros_like(p)) for name, p in named]


def _innermost(objective: Objective, batch: Batch) -> Found:
    found, blamed, rows = [], list[str](), num_rows(batch)
    names = dict(objective.model.named_modules())
    kept = {name: _attributes(module) for name, module in names.items()}
    with mode(objective, training=True):
        fewer = passed(objective, select(batch, torch.arange(rows - 1))) if rows > 1 else {}
        whole = passed(objective, batch)
        for name, (call, _) in whole.items():  # innermost first, as they end
            if any(_is_within(inner, name) for inner in blamed):
                continue
            fault = _asked(call, fewer[name][0] if name in fewer else None, rows)
            if fault:
                blamed.append(name)
                found.append((call.title, fault))
        odd = first_to_differ(passed(objective, batch), whole)
    if odd is not None:  # the questions themselves were calls enough for it
        return [(odd.title, f"{UNSTEADY}{_from(MANY)}: {_kept(kept[odd.name], odd.module)}")]
    return found


def _asked(call: Call, fewer: Call | None, rows: int) -> str | None:
    """The fault of a module, none if it cannot be called apart from the model it is in."""
    try:
        first = call.again(1)
        with without_dropout(call.module):
            draws_itself = not equal(call.again(1), call.again(2))
        with mode(call.module, False) if draws_itself else nullcontext():  # to draw nothing
            fault = _fault(call, fewer, rows)
        return fault if equal(first, call.again(1)) else None  # it keeps count: asked as a whole
    except Exception:  # a user's module can fail in any way where it was not meant to be called
        return None


def _fault(call: Call, fewer: Call | None, rows: int) -> str | None:
    """How rows depend on each other in one module; `fewer` is its call with one row less."""
    with without_dropout(call.module):
        flags = _by_row(call, fewer, rows)
        if flags and _is_coupled(call, flags, rows):
            is_norm = isinstance(call.module, nn.modules.batchnorm._BatchNorm)
            return "normalises by the statistics of one micro-batch" if is_norm else OTHER_NUMBERS
        if not _is_linear(call):
            acts = "acts on each micro-batch's part of the gradient, not on their sum"
            for name, parameter in call.module.named_parameters():
                if hooks(parameter) or parameter._post_accumulate_grad_hooks:
                    return f"the gradient hook on `{name}` {acts}"
            return f"a hook, or its own backward pass, {acts}"
        if flags and not _adds_up(call, flags, rows):
            return OTHER_GRADIENT
    return None


def _by_row(call: Call, fewer: Call | None, rows: int) -> list[bool]:
    """Which of the tensors it is given have a row of the batch in each place; none if unclear."""
    given, other = call.given, fewer.given if fewer else []
    if len(given) != len(other) or any(len(t) != rows for t in call.again(1)):
        return []
    lengths = [(len(a), len(b)) for a, b in zip(given, other, strict=True)]
    flags = [one != less for one, less in lengths]
    if any(one != less and (one, less) != (rows, rows - 1) for one, less in lengths):
        return []  # as of flat ids with offsets
    return flags if any(flags) else []


def _is_coupled(call: Call, flags: list[bool], rows: int) -> bool:
    half, everything = rows // 2, torch.arange(rows)
    others = torch.cat([everything[:half], everything[: rows - half] % half])  # the first, twice
    whole = call.again(1)
    if not equal(whole, call.again(2)):  # it draws random numbers: they follow the micro-batch
        return False
    try:
        exchanged = call.again(1, flags, others)
        if not _same_rows(exchanged, whole, half, CONTENT_RTOL[call.precision]):
            return True
        alone, last = (
            call.again(1, flags, part) for part in (everything[:half], everything[half:])
        )
    except Exception:  # a module that takes no other rows cannot be asked
        return False
    ends = [tensor[half:] for tensor in whole]
    rtol = SHAPE_RTOL[call.precision]
    return not (_same_rows(alone, whole, half, rtol) and _same_rows(last, ends, rows - half, rtol))


def _same_rows(one: list[Tensor], other: list[Tensor], num: int, rtol: float) -> bool:
    return all(close(a[:num], b[:num], rtol) for a, b in zip(one, other, strict=True))


def _adds_up(call: Call, flags: list[bool], rows: int) -> bool:
    """Whether the gradients of its inputs and weights for all rows are those of two parts."""
    if not equal(call.again(1), call.again(2)):
        return True  # it draws random numbers: they follow the micro-batch

    def gradients(chosen: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return call.gradients(1, lambda t, place: _numbers(t, place, rows)[chosen], flags, chosen)

    half, everything = rows // 2, torch.arange(rows)
    whole = gradients(everything)
    one, other = gradients(everything[:half]), gradients(everything[half:])
    floating = [f for t, f in zip(call.given, flags, strict=True) if t.is_floating_point()]
    summed = [a + b for a, b in zip(one[0], other[0], strict=True)]
    both = zip(one[1], other[1], floating, strict=True)
    summed += [torch.cat([a, b]) if is_cut else a + b for a, b, is_cut in both]
    return _near(summed, [*whole[0], *whole[1]])


def _numbers(like: Tensor, place: int, rows: int | None = None) -> Tensor:
    """The same random numbers for as many rows, whatever was drawn before."""
    generator = torch.Generator().manual_seed(place + 7)
    shape = like.shape if rows is None else (rows, *like.shape[1:])
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(like.dtype)


def _near(
    ones: list[Tensor], others: list[Tensor], rtol: float = GRADIENT_RTOL, least: float = 0.1
) -> bool:
    """Sums of the same parts in another order; what is not finite, as of a mask, is not asked.

    A gradient that is nothing but rounding, as of an attention's key bias, has `least` of the scale
    of others.
    """
    pairs = [(a, b) for a, b in zip(ones, others, strict=True) if b.numel() and b.isfinite().all()]
    scales = [float(b.abs().max()) for _, b in pairs]
    floor = max(scales, default=0.0) * least
    return all(
        float((a - b).abs().max()) <= rtol * max(scale, floor)
        for (a, b), scale in zip(pairs, scales, strict=True)
    )


def _is_linear(call: Call) -> bool:
    """Whether gradients for sums, and for multiples, are sums and multiples of gradients."""

    def gradients(scale: float, *numbers: int) -> list[Tensor]:
        def of(output: Tensor, place: int) -> Tensor:
            parts = [_numbers(output, place + number) for number in numbers]
            return torch.stack(parts).sum(0) * scale

        weights, inputs = call.gradients(1, of)
        return weights + inputs

    one, other = gradients(1.0, 0), gradients(1.0, 100)
    both = [a + b for a, b in zip(one, other, strict=True)]
    large = [LARGE * part for part in one]
    return _near(both, gradients(1.0, 0, 100)) and _near(large, gradients(LARGE, 0), MULTIPLE_RTOL)


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
            m.train(was_training)


def _is_within(inner: str, name: str) -> bool:
    return inner != name and (not name or inner.startswith(f"{name}."))
