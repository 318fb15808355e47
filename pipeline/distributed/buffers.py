"""What forward passes change besides gradients: running statistics, sums and counts of rows."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.data.batch import Batch, num_rows, select
from pipeline.distributed import comm
from pipeline.errors import UsageError
from pipeline.losses.objective import Objective
from pipeline.probes.calls import kept_buffers, without_dropout

LEAST = torch.iinfo(torch.int64).min
MOST_ROWS = 16
ADDS_RTOL = 1e-5
"""What rounding may leave between the change by all rows and those by two parts of them."""


@dataclass(frozen=True)
class Place:
    """Where a buffer is, and how it was at first: a forward pass may put another tensor there."""

    name: str
    module: nn.Module
    own: str
    first: Tensor
    """Its type, shape and device, in the memory of one number."""
    adds_up: bool

    @property
    def now(self) -> Tensor | None:
        """The buffer as it is, if it has the shape that it had at first."""
        found: Tensor | None = getattr(self.module, self.own)
        return found if found is not None and found.shape == self.first.shape else None

    def value(self) -> Tensor:
        """The buffer as it is; zeros stand for one of another shape, or none."""
        return torch.zeros_like(self.first) if self.now is None else self.now.detach()

    @property
    def is_summed(self) -> bool:
        """Whether its changes are summed over micro-batches, and not the largest value taken."""
        return self.adds_up or self.first.is_floating_point() or self.first.is_complex()


class Buffers:
    """The buffers of a model, and what becomes of them when several micro-batches change them.

    Each micro-batch starts from the step's buffers. Of one that adds up over rows, as a sum or a
    count of them, the changes are summed, as all rows at once would change it; of another, such as
    a running mean, their mean is taken; of whole numbers, and of yes and no, the largest value. One
    whose shape is changed, as a cache that grows with what it is asked for, is left as it is; and
    so are sparse ones, which `changing` lets no forward pass change.
    """

    def __init__(self, objective: Objective) -> None:
        places = []
        for path, buffer in objective.named_buffers():
            if buffer.layout != torch.strided:
                continue
            module, _, own = path.rpartition(".")
            home, adds_up = objective.get_submodule(module), objective.changing.get(path, False)
            first = buffer.new_empty(()).expand(buffer.shape)
            places.append(Place(path, home, own, first, adds_up))
        self._summed = [place for place in places if place.is_summed]
        self._largest = [place for place in places if not place.is_summed]
        self.size = sum(value.numel() for value in self.values)

    @property
    def values(self) -> list[Tensor]:
        """Those whose changes are summed, as they are now; complex ones as pairs of numbers."""
        return [_real(place.value()) for place in self._summed]

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Floating-point types among them."""
        return {value.dtype for value in self.values if value.is_floating_point()}

    @property
    def kept(self) -> Iterator[tuple[str, Tensor, bool]]:
        """Name and value of each, and whether it has the shape that it had at first."""
        for place in (*self._summed, *self._largest):
            yield place.name, place.value(), place.now is not None

    def __bool__(self) -> bool:
        return bool(self._summed or self._largest)

    def copy(self) -> list[Tensor]:
        """Their values now."""
        return [
            *(value.clone() for value in self.values),
            *(p.value().clone() for p in self._largest),
        ]

    def restore(self, values: list[Tensor]) -> None:
        """Take the values of an earlier `copy`."""
        for place, value in zip((*self._summed, *self._largest), values, strict=True):
            if place.now is None:
                continue
            if place.now.requires_grad:  # put there by a forward pass, with its graph
                setattr(place.module, place.own, place.now.detach().clone())
            _real(place.now).copy_(value)

    def changes(self, before: list[Tensor]) -> Tensor:
        """How far the summed ones are from an earlier `copy`, in one vector.

        Exactly 0 for those that no forward pass has touched, whatever their value.
        """
        parts = [
            torch.zeros_like(then) if place.now is None
            else torch.where(now == then, torch.zeros_like(now), now - _finite(then))
            for place, now, then in zip(self._summed, self.values, before, strict=False)
        ]  # fmt: skip
        return torch.cat([part.reshape(-1) for part in parts]) if parts else torch.empty(0)

    def change(self, before: list[Tensor], sums: Tensor, number: float, has_rows: bool) -> None:
        """An earlier `copy`, and the changes of a `number` of micro-batches, which were summed.

        The largest values are those of workers that had rows.
        """
        pieces = torch.split(sums, [value.numel() for value in before[: len(self._summed)]])
        for place, then, piece in zip(self._summed, before, pieces, strict=False):
            if place.now is None:
                continue
            setattr(place.module, place.own, place.now.detach())
            changed = piece if place.adds_up else piece / number
            was_changed = changed.view_as(then) != 0
            made = _finite(then) + changed.view_as(then).to(then.dtype)
            _real(place.value()).copy_(torch.where(was_changed, made, then))
        if comm.num_workers() == 1:
            return
        for place in self._largest:
            value = place.value()
            own = value.long() if has_rows else torch.full_like(value, LEAST, dtype=torch.int64)
            largest = comm.largest(own)
            if place.now is not None:
                place.now.copy_(largest)


def _finite(tensor: Tensor) -> Tensor:
    """0 where a buffer starts as infinite, as one for the least value so far."""
    return torch.where(tensor.isfinite(), tensor, torch.zeros_like(tensor))


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def changing(objective: Objective, batch: Batch) -> dict[str, bool]:
    """Names of the buffers that a forward pass changes, and whether they add up over rows.

    Tried on a copy, in float64 if it can be. BatchNorm's are known to be means.
    Raises UsageError with the name of a sparse buffer that changes: workers could not share it.
    """
    norms = [m for m in objective.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    known = {id(buffer) for norm in norms for buffer in norm.buffers(recurse=False)}
    names = [name for name, buffer in objective.named_buffers() if id(buffer) not in known]
    for in_float64 in (True, False) if names else ():
        try:
            tried = _copied(objective, in_float64)
            with without_dropout(tried):
                return _tried(tried, batch, names)
        except UsageError:
            raise
        except Exception:  # it takes no float64, or no such part of a batch
            continue
    return {}


def _tried(objective: Objective, batch: Batch, names: list[str]) -> dict[str, bool]:
    """As `changing` says, of the buffers that are named.

    One that adds up changes by all rows as by two parts of them together, at first and later too: a
    moving average does so from zeros only.
    """
    rows = torch.arange(min(num_rows(batch), MOST_ROWS))
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


def _copied(objective: Objective, in_float64: bool) -> Objective:
    """The objective in training; itself where it cannot be copied."""
    try:
        tried = copy.deepcopy(objective)
    except Exception:  # as of a weight that is made before each call
        return objective
    if in_float64:
        tried.widen()
    elif tried.precision == torch.bfloat16:
        tried.precision = torch.float32
    return tried.train()


def _forward(objective: Objective, batch: Batch, rows: Tensor) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        objective.predict(select(batch, rows))


def _changes(
    objective: Objective, batch: Batch, names: list[str], rows: Tensor
) -> dict[str, Tensor]:
    """By how much a forward pass changes each buffer that keeps its shape; they stay as before."""
    before = {name: objective.get_buffer(name).detach().clone() for name in names}
    with kept_buffers(objective):
        _forward(objective, batch, rows)
        now = dict(objective.named_buffers())
        found = {}
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
                found[name] = now[name].detach().to(wide) - then.to(wide)
    return found


def _is_sum(whole: Tensor, one: Tensor, other: Tensor) -> bool:
    """Whether the change by all rows is the sum of those by two parts."""
    if not bool(whole.isfinite().all()):
        return False
    return bool(((one + other - whole).abs() <= ADDS_RTOL * whole.abs().max()).all())
