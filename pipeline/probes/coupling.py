"""Modules that couple the rows of a batch: another split would give other numbers."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from pipeline.data.batch import Batch, num_rows, select
from pipeline.losses.objective import Objective
from pipeline.probes.calls import (
    Call,
    Found,
    close,
    equal,
    first_to_differ,
    gradients_of,
    hooks,
    kept_buffers,
    mode,
    passed,
    without_dropout,
)
from pipeline.probes.steadiness import MANY, UNSTEADY, attributes_of, kept_in, late

SHAPE_RTOL = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.02}
"""What another number of rows may leave: some modules compute in float32 whatever they get."""
GRADIENT_RTOL = 0.1
"""Tolerance for gradients summed in another order: parts of a model may compute in bfloat16."""
CONTENT_RTOL = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 0.02}
"""What other contents of as many rows may leave, which is nothing unless they change a shape."""
EXACT_RTOL = 1e-6
"""The same, where all parts compute in float64; other differences are looked into."""
MULTIPLE_RTOL = 1e-5
"""Tolerance for gradients multiplied by a power of 2, which rounds nothing."""
OTHER_NUMBERS = "gives a row different numbers when other rows are beside it"
OTHER_GRADIENT = "gives a row a different gradient when other rows are beside it"
LARGE = 2.0**14
"""Times ordinary gradients: those that a clipping hook acts on."""


def coupled(objective: Objective, batch: Batch, size: int) -> Found:
    """Modules whose numbers or gradients for a row depend on the rows beside it.

    They are asked one by one where the model as a whole does so, as in micro-batches of `size`: a
    module may be given other things than rows, and its parts may make up for each other.
    """
    with mode(objective, training=True), without_dropout(objective.model):
        whole = _Whole(objective, batch, size)
        fault, is_sure = whole.numbers() or whole.gradients() or ("", False)
    faults = _innermost(objective, batch) if fault else []
    return faults or ([("model", fault)] if is_sure else [])


class _Whole:
    """How the numbers and gradients of a whole model depend on the other rows of a batch.

    Each answer is a fault, and whether the model has it if none of its modules has: one that draws
    random numbers can only be asked part by part.
    """

    def __init__(self, objective: Objective, batch: Batch, size: int) -> None:
        self.objective = objective
        self.batch = batch
        self.size = size
        self.rows = num_rows(batch)
        everything = torch.arange(self.rows)
        self.all, self.left, self.right = everything, *everything.tensor_split(2)

    def numbers(self) -> tuple[str, bool] | None:
        """Of rows in other batches: smaller ones, and as large with other rows beside them."""
        whole = self._predict(self.all)
        if not equal(whole, self._predict(self.all, seed=2)):
            return OTHER_NUMBERS, False
        parts = self.left, self.right, self.all[: self.size], self.all[-self.size :]
        alone = [self._predict(part) for part in parts]
        shapes = [[tensor.shape[1:] for tensor in values] for values in (whole, *alone)]
        if any(shape != shapes[0] for shape in shapes) or any(len(t) != self.rows for t in whole):
            return None  # as of rows that are filled up to the longest: their losses are asked
        left, right = self.left, self.right
        others = (torch.cat([left, left, left])[: self.rows], torch.cat([right, right, right]))
        exchanged = [self._predict(others[0]), self._predict(others[1][-self.rows :])]
        precision = self.objective.precision
        pairs = [
            *(
                (values, whole, part, SHAPE_RTOL[precision])
                for values, part in zip(alone, parts, strict=True)
            ),
            ([t[: len(left)] for t in exchanged[0]], whole, left, CONTENT_RTOL[precision]),
            ([t[-len(right) :] for t in exchanged[1]], whole, right, CONTENT_RTOL[precision]),
        ]
        for values, known, part, rtol in pairs:
            if not all(close(a, b[part], rtol) for a, b in zip(values, known, strict=True)):
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
            summed = [a + b for a, b in both]
            whole = self._gradient(self.all, scale)
            if not _near(summed, whole, EXACT_RTOL, EXACT_RTOL):
                return OTHER_GRADIENT, not _near(summed, whole)
        return None

    def _predict(self, chosen: Tensor, seed: int = 1) -> list[Tensor]:
        with kept_buffers(self.objective), torch.no_grad():
            torch.manual_seed(seed)
            outputs = self.objective.predict(select(self.batch, chosen))
        names = [name for term in self.objective.terms for name in term.outputs]
        return [outputs[name] for name in names or outputs]

    def _gradient(self, chosen: Tensor, scale: float) -> list[Tensor]:
        gradients = gradients_of(self.objective, select(self.batch, chosen), scale)
        named = self.objective.named_parameters()
        return [
            gradients.get(name.removeprefix("model."), torch.zeros_like(p)) for name, p in named
        ]


def _innermost(objective: Objective, batch: Batch) -> Found:
    faults = []
    blamed = list[str]()
    rows = num_rows(batch)
    names = dict(objective.model.named_modules())
    before = {name: attributes_of(module) for name, module in names.items()}
    with mode(objective, training=True):
        fewer = passed(objective, select(batch, torch.arange(rows - 1))) if rows > 1 else {}
        whole = passed(objective, batch)
        for name, (call, _) in whole.items():  # innermost first, as they end
            if any(_is_within(inner, name) for inner in blamed):
                continue
            fault = _ask(call, fewer[name][0] if name in fewer else None, rows)
            if fault:
                blamed.append(name)
                faults.append((call.title, fault))
        odd = first_to_differ(passed(objective, batch), whole)
    if odd is not None:  # the questions themselves were calls enough for it
        return [(odd.title, f"{UNSTEADY}{late(MANY)}: {kept_in(before[odd.name], odd.module)}")]
    return faults


def _ask(call: Call, fewer: Call | None, rows: int) -> str | None:
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
    inputs = call.given
    other = fewer.given if fewer else []
    if len(inputs) != len(other) or any(len(t) != rows for t in call.again(1)):
        return []
    lengths = [(len(a), len(b)) for a, b in zip(inputs, other, strict=True)]
    flags = [one != less for one, less in lengths]
    if any(one != less and (one, less) != (rows, rows - 1) for one, less in lengths):
        return []  # as of flat ids with offsets
    return flags if any(flags) else []


def _is_coupled(call: Call, flags: list[bool], rows: int) -> bool:
    half = rows // 2
    everything = torch.arange(rows)
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
        return call.gradients(1, lambda t, index: _numbers(t, index, rows)[chosen], flags, chosen)

    half = rows // 2
    everything = torch.arange(rows)
    whole = gradients(everything)
    one = gradients(everything[:half])
    other = gradients(everything[half:])
    floating = [f for t, f in zip(call.given, flags, strict=True) if t.is_floating_point()]
    summed = [a + b for a, b in zip(one[0], other[0], strict=True)]
    both = zip(one[1], other[1], floating, strict=True)
    summed += [torch.cat([a, b]) if is_cut else a + b for a, b, is_cut in both]
    return _near(summed, [*whole[0], *whole[1]])


def _numbers(like: Tensor, seed: int, rows: int | None = None) -> Tensor:
    """The same random numbers for as many rows, whatever was drawn before."""
    generator = torch.Generator().manual_seed(seed + 7)
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

    def gradients(scale: float, *seeds: int) -> list[Tensor]:
        def of(output: Tensor, index: int) -> Tensor:
            parts = [_numbers(output, index + seed) for seed in seeds]
            return torch.stack(parts).sum(0) * scale

        weights, inputs = call.gradients(1, of)
        return weights + inputs

    one = gradients(1.0, 0)
    other = gradients(1.0, 100)
    both = [a + b for a, b in zip(one, other, strict=True)]
    large = [LARGE * part for part in one]
    return _near(both, gradients(1.0, 0, 100)) and _near(large, gradients(LARGE, 0), MULTIPLE_RTOL)


def _is_within(inner: str, name: str) -> bool:
    return inner != name and (not name or inner.startswith(f"{name}."))
