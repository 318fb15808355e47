"""What forward passes change besides gradients: running statistics, sums and counts of rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.distributed import comm

LEAST = torch.iinfo(torch.int64).min


@dataclass(frozen=True)
class BufferRef:
    """Where a buffer is, and how it was at first: a forward pass may put another tensor there."""

    name: str
    module: nn.Module
    attribute: str
    template: Tensor
    """Its type, shape and device, in the memory of one number."""
    adds_up: bool

    @property
    def now(self) -> Tensor | None:
        """The buffer as it is, if it has the shape that it had at first."""
        buffer: Tensor | None = getattr(self.module, self.attribute)
        return buffer if buffer is not None and buffer.shape == self.template.shape else None

    def value(self) -> Tensor:
        """The buffer as it is; zeros stand for one of another shape, or none."""
        return torch.zeros_like(self.template) if self.now is None else self.now.detach()

    @property
    def is_summed(self) -> bool:
        """Whether its changes are summed over micro-batches, and not the largest value taken."""
        return self.adds_up or self.template.is_floating_point() or self.template.is_complex()


class Buffers:
    """The buffers of a model, and how the changes of several micro-batches are combined.

    Each micro-batch starts from the step's buffers. Afterwards a buffer

    - that adds up over rows, as a sum or a count of them, has the sum of the changes,
    - of other fractions, as a running mean, their mean,
    - of whole numbers or booleans, the largest value,
    - whose shape was changed, as a cache that grows, is each worker's own,
    - that is sparse is unchanged: no forward pass may change it.
    """

    def __init__(self, objective: nn.Module, changing: Mapping[str, bool]) -> None:
        """`changing` names those that forward passes change, and says whether they add up."""
        buffers = []
        for path, buffer in objective.named_buffers():
            if buffer.layout != torch.strided:
                continue
            module, _, attribute = path.rpartition(".")
            owner = objective.get_submodule(module)
            adds_up = changing.get(path, False)
            template = buffer.new_empty(()).expand(buffer.shape)
            buffers.append(BufferRef(path, owner, attribute, template, adds_up))
        self._summed = [ref for ref in buffers if ref.is_summed]
        self._largest = [ref for ref in buffers if not ref.is_summed]
        self.size = sum(value.numel() for value in self.values)

    @property
    def values(self) -> list[Tensor]:
        """Those whose changes are summed, as they are now; complex ones as pairs of numbers."""
        return [_real(ref.value()) for ref in self._summed]

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Floating-point types among them."""
        return {value.dtype for value in self.values if value.is_floating_point()}

    @property
    def entries(self) -> Iterator[tuple[str, Tensor, bool]]:
        """Name and value of each, and whether it has the shape that it had at first."""
        for ref in (*self._summed, *self._largest):
            yield ref.name, ref.value(), ref.now is not None

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
        for ref, value in zip((*self._summed, *self._largest), values, strict=True):
            if ref.now is None:
                continue
            if ref.now.requires_grad:  # put there by a forward pass, with its graph
                setattr(ref.module, ref.attribute, ref.now.detach().clone())
            _real(ref.now).copy_(value)

    def changes(self, before: list[Tensor]) -> Tensor:
        """Changes of the summed ones since an earlier `copy`, in one vector.

        Exactly 0 for those that no forward pass has touched, whatever their value.
        """
        parts = [
            torch.zeros_like(then)
            if ref.now is None
            else torch.where(now == then, torch.zeros_like(now), now - _zero_nonfinite(then))
            for ref, now, then in zip(self._summed, self.values, before, strict=False)
        ]
        return torch.cat([part.reshape(-1) for part in parts]) if parts else torch.empty(0)

    def apply_changes(
        self, before: list[Tensor], sums: Tensor, num_microbatches: float, has_rows: bool
    ) -> None:
        """Set an earlier `copy` plus the changes of `num_microbatches`, which were summed.

        The largest values are those of workers that had rows.
        """
        pieces = torch.split(sums, [value.numel() for value in before[: len(self._summed)]])
        for ref, then, piece in zip(self._summed, before, pieces, strict=False):
            if ref.now is None:
                continue
            setattr(ref.module, ref.attribute, ref.now.detach())
            changed = piece if ref.adds_up else piece / num_microbatches
            was_changed = changed.view_as(then) != 0
            after = _zero_nonfinite(then) + changed.view_as(then).to(then.dtype)
            _real(ref.value()).copy_(torch.where(was_changed, after, then))
        if comm.num_workers() == 1:
            return
        for ref in self._largest:
            value = ref.value()
            given = value.long() if has_rows else torch.full_like(value, LEAST, dtype=torch.int64)
            largest = comm.largest(given)
            if ref.now is not None:
                ref.now.copy_(largest)


def _zero_nonfinite(tensor: Tensor) -> Tensor:
    """0 where a buffer starts as infinite, as one for the least value so far."""
    return torch.where(tensor.isfinite(), tensor, torch.zeros_like(tensor))


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
