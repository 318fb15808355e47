"""What forward passes change besides gradients: running statistics, sums and counts of rows."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.data.batch import Batch, num_rows, select
from pipeline.losses.objective import Objective

LEAST = torch.iinfo(torch.int64).min
ADDS_RTOL = 1e-4
"""What rounding may leave between the change by all rows and those by two parts of them."""


@dataclass(frozen=True)
class Place:
    """Where a buffer is, and how it was at first: a forward pass may put another tensor there."""

    name: str
    module: nn.Module
    own: str
    first: Tensor
    """Its type, shape and device; not its values."""
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
    so are sparse ones, which `added_up` lets no forward pass change.
    """

    def __init__(self, objective: Objective) -> None:
        places = []
        for path, buffer in objective.named_buffers():
            if buffer.layout != torch.strided:
                continue
            module, _, own = path.rpartition(".")
            home, adds_up = objective.get_submodule(module), path in objective.adding_up
            places.append(Place(path, home, own, torch.empty_like(buffer), adds_up))
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
            else torch.where(now == then, torch.zeros_like(now), now - then)
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
            _real(place.value()).copy_(then + changed.view_as(then).to(then.dtype))
        if not (dist.is_initialized() and dist.get_world_size() > 1):
            return
        for place in self._largest:
            value = place.value()
            told = value.long() if has_rows else torch.full_like(value, LEAST, dtype=torch.int64)
            dist.all_reduce(told, dist.ReduceOp.MAX)
            if place.now is not None:
                place.now.copy_(told)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def adding_up(objective: Objective, batch: Batch) -> frozenset[str]:
    """Names of the buffers that add up over rows: tried on a copy, with all rows and two parts.

    Raises ValueError with the name of a sparse buffer that a forward pass changes: workers could
    not share it.
    """
    norms = [m for m in objective.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    known = {id(buffer) for norm in norms for buffer in norm.buffers(recurse=False)}
    names = [name for name, buffer in objective.named_buffers() if id(buffer) not in known]
    rows = num_rows(batch)
    if not names or rows < 3:
        return frozenset()
    everything = torch.arange(rows)
    whole, one, other = (
        _changed(objective, select(batch, part), names)
        for part in (everything, everything[: rows // 3], everything[rows // 3 :])
    )
    return frozenset(
        name
        for name, change in whole.items()
        if name in one and name in other and bool(change.any())
        and torch.allclose(one[name] + other[name], change, rtol=ADDS_RTOL, atol=0)
    )  # fmt: skip


def _changed(objective: Objective, batch: Batch, names: list[str]) -> dict[str, Tensor]:
    """By how much a forward pass changes each buffer that keeps its shape; none if it fails."""
    try:
        tried = copy.deepcopy(objective).train()
        before = {name: tried.get_buffer(name).clone() for name in names}
        torch.manual_seed(0)
        with torch.no_grad():
            tried.predict(batch)
    except Exception:  # what cannot be copied, or takes no such part of a batch
        return {}
    found = {}
    for name, then in before.items():
        now = dict(tried.named_buffers()).get(name)
        if now is None or now.shape != then.shape:
            continue
        if then.layout != torch.strided:
            if not torch.equal(now.to_dense(), then.to_dense()):
                raise ValueError(name)
        elif then.dtype != torch.bool:
            wide = torch.complex128 if then.is_complex() else torch.float64
            found[name] = now.detach().to(wide) - then.to(wide)
    return found
