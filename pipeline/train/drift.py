"""Do all workers hold the same weights? They must, or the run is not the spec's any more.

Sums over workers keep them equal; something else can part them, such as an optimizer that draws
random numbers from elsewhere than torch, or a buffer that follows a worker's own rows.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.errors import RunError
from pipeline.train import reduce

MOST_NAMES = 3


def refuse(
    objective: nn.Module, optimizer: torch.optim.Optimizer, buffers: reduce.Buffers, step: int
) -> None:
    """Raise RunError on every worker, with names, when their states after `step` steps differ."""
    if reduce.num_workers() == 1:
        return
    state = dict(_state(objective, optimizer, buffers))
    if not reduce.agree(zlib.crc32("\n".join(state).encode())):
        raise _drifted(step, ["the names in the optimizer's state"])
    sums = torch.stack([_checksum(value) for value in state.values()])
    both = torch.cat([sums, ~sums])  # ~x falls where x rises: the largest of each tells both ends
    both = both.to(reduce.meeting_device())
    dist.all_reduce(both, dist.ReduceOp.MAX)
    most, least = both[: len(sums)], ~both[len(sums) :]
    odd = [name for name, same in zip(state, (most == least).tolist(), strict=True) if not same]
    if odd:
        raise _drifted(step, odd)


def _drifted(step: int, names: list[str]) -> RunError:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return RunError(
        f"after step {step} the workers no longer hold the same {', '.join(names[:MOST_NAMES])}"
        f"{more}: something besides the sums over workers changes it, such as an optimizer or "
        "module that draws random numbers from elsewhere than torch, or that remembers its own "
        "rows. `pipeline prove` looks for it; the checkpoint before is kept"
    )


def _state(
    objective: nn.Module, optimizer: torch.optim.Optimizer, buffers: reduce.Buffers
) -> Iterator[tuple[str, Tensor]]:
    """What every worker must hold alike, by name: not caches, which grow with its own rows."""
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    yield from objective.named_parameters()
    for name, buffer in objective.named_buffers():
        module, _, own = name.rpartition(".")
        if not buffers.has_grown(objective.get_submodule(module), own):
            yield name, buffer
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            yield from _numbers(f"{key} of {names.get(id(parameter), 'a parameter')}", value)
    for place, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if key != "params":
                yield from _numbers(f"the optimizer's {key} (group {place})", value)


def _numbers(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, bool | int | float):
        yield name, torch.tensor(value, dtype=torch.float64)


def _checksum(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bytes, eight at a time, as one int64 that may wrap around."""
    tensor = tensor.detach()
    if tensor.is_sparse or not tensor.numel():
        return torch.zeros((), dtype=torch.int64)
    is_dense = torch.empty_like(tensor).stride() == tensor.stride()  # in whatever order
    flat = tensor.as_strided((tensor.numel(),), (1,)) if is_dense else tensor.reshape(-1)
    octets = flat.contiguous().view(torch.uint8)
    end = len(octets) // 8 * 8
    words = octets[:end]
    if words.storage_offset() % 8:
        words = words.clone()
    total: Tensor = words.view(torch.int64).sum() + octets[end:].sum(dtype=torch.int64)
    return total.cpu()
