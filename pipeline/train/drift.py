"""Do all workers hold the same weights? They must, or the run is not the spec's any more.

Sums over workers keep them equal; something else can part them, such as an optimizer that draws
random numbers from elsewhere than torch, or a buffer that follows a worker's own rows.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.distributed import comm
from pipeline.distributed.buffers import Buffers
from pipeline.errors import RunError
from pipeline.train.weights import octets

MAX_NAMES = 3


def refuse(
    objective: nn.Module, optimizer: torch.optim.Optimizer, buffers: Buffers, step: int
) -> None:
    """Raise RunError on every worker, with names, when their states after `step` steps differ."""
    if comm.num_workers() == 1:
        return
    shared = list(buffers.entries)
    grown = comm.all_reduce(
        torch.tensor([not is_kept for *_, is_kept in shared], dtype=torch.float64)
    )
    caches = {name for (name, *_), is_grown in zip(shared, grown.tolist(), strict=True) if is_grown}
    known = [(name, value) for name, value, _ in shared if name not in caches]
    state = dict([*known, *_state(objective, optimizer)])
    if not comm.all_agree(torch.tensor([zlib.crc32("\n".join(state).encode())])).all():
        raise _find_drift(step, ["names in the optimizer's state"])
    checksums = torch.stack([_checksum(value) for value in state.values()])
    is_same = comm.all_agree(checksums).tolist()
    odd = [name for name, same in zip(state, is_same, strict=True) if not same]
    if odd:
        raise _find_drift(step, odd)


def _find_drift(step: int, names: list[str]) -> RunError:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return RunError(
        f"after step {step} the workers no longer hold the same {', '.join(names[:MAX_NAMES])}"
        f"{more}: something besides the sums over workers changes it, such as an optimizer or "
        "module that draws random numbers from elsewhere than torch, or that remembers its own "
        "rows. `pipeline prove` looks for it; the checkpoint before is kept"
    )


def _state(objective: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """What every worker must hold alike besides buffers, by name."""
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    yield from objective.named_parameters()
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            yield from _numbers(f"{key} of {names.get(id(parameter), 'a parameter')}", value)
    for index, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if key != "params":
                yield from _numbers(f"the optimizer's {key} (group {index})", value)


def _numbers(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, bool | int | float):
        yield name, torch.tensor(value, dtype=torch.float64)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _numbers(f"{name}[{index}]", item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(f"{name}[{key!r}]", item)


def _checksum(tensor: Tensor) -> Tensor:
    """CRC-32 of a tensor's bytes: int64."""
    return torch.tensor(zlib.crc32(octets(tensor)))
