"""What workers tell each other: sums, and whether they agree. Never means of means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

ECHOES = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "NCCL")
"""What torch.distributed says in a worker whose neighbour is gone."""


def num_workers() -> int:
    """Worker processes of this run; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Index of this worker, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_echo(error: object) -> bool:
    """Whether a worker only failed because another did: its connection was closed."""
    return isinstance(error, RuntimeError) and any(text in str(error) for text in ECHOES)


def barrier() -> None:
    """Wait until every worker has come here."""
    if dist.is_initialized():
        dist.barrier()


def exchange_device() -> torch.device:
    """Where tensors have to be that workers exchange."""
    on_gpu = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def zeros(size: int, device: torch.device) -> Tensor:
    """Float64 [size] to be summed over workers: where they exchange it, else on `device`."""
    where = exchange_device() if num_workers() > 1 else device
    return torch.zeros(size, dtype=torch.float64, device=where)


def all_reduce(values: Tensor) -> Tensor:
    """Sum of a tensor over all workers, on the CPU."""
    if num_workers() > 1:
        values = values.to(exchange_device()).clone()
        dist.all_reduce(values)
    return values.cpu()


def sum_by_index(parts: Mapping[int, Tensor], num_parts: int, size: int) -> Tensor:
    """Sum of all workers' vectors [size], in float64 and in the order of their indices.

    The order is what makes the bits the same however the vectors are spread over workers.
    """
    table = zeros(num_parts * size, torch.device("cpu")).view(num_parts, size)
    for index, part in parts.items():
        table[index] = part
    return all_reduce(table).sum(0)


def from_first(value: Any) -> Any:
    """The first worker's object, on every worker; the others' are ignored."""
    box = [value]
    if num_workers() > 1:
        dist.broadcast_object_list(box, 0, device=exchange_device())
    return box[0]


def tensors_from_first(value: Any) -> Any:
    """`from_first` for a structure of dicts and lists that has large tensors, on the CPU.

    Each dense tensor is a message of its own, so that no worker holds two copies of all of them;
    its layout in memory is kept.
    """
    if num_workers() == 1:
        return value
    form = from_first(tree_map_only(_is_dense, lambda tensor: tensor.to("meta"), value))
    if rank() == 0:
        for tensor in filter(_is_dense, tree_leaves(value)):
            _broadcast(tensor.clone())  # in memory of its own, without gaps
        return value
    return tree_map_only(
        _is_dense, lambda like: _broadcast(torch.empty_like(like, device="cpu")), form
    )


def _is_dense(value: Any) -> bool:
    """Whether it is a tensor whose numbers are its memory; others are pickled."""
    if not isinstance(value, Tensor) or value.is_nested or value.is_quantized:
        return False
    return value.layout == torch.strided


def _broadcast(tensor: Tensor) -> Tensor:
    """The first worker's tensor, in the memory of this one, which has its type and layout."""
    content = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    sent = content.to(exchange_device())
    dist.broadcast(sent, 0)
    content.copy_(sent)
    return tensor


def of_all(value: Any) -> list[Any]:
    """Every worker's object, by rank."""
    values = [value] * num_workers()
    if num_workers() > 1:
        dist.all_gather_object(values, value)
    return values


def largest(values: Tensor) -> Tensor:
    """The largest of the workers' numbers, for each place of an int64 tensor."""
    if num_workers() > 1:
        values = values.to(exchange_device()).clone()
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values.cpu()


def all_agree(values: Tensor) -> Tensor:
    """Whether all workers have the same number, for each place of an int64 vector: bool."""
    ends = largest(torch.cat([values, ~values]))  # ~x falls where x rises: both ends at once
    most = ends[: len(values)]
    least = ~ends[len(values) :]
    return most == least


def gather_parts(
    parts: Mapping[int, list[Tensor]], num_parts: int, device: torch.device
) -> list[list[Tensor]]:
    """The tensors of all workers: for each slot in their lists, those of parts 0 to `num_parts`.

    Tensors of one slot have one type, and one shape but for their rows. Raises ValueError where
    they have not.
    """
    described = _describe_parts(parts)
    num_slots = max((len(tensors) for tensors in described.values()), default=0)
    gathered = []
    for slot in range(num_slots):
        kinds = {(kind, shape[1:]) for kind, shape in (d[slot] for d in described.values())}
        if len(kinds) != 1 or any(not d[slot][1] for d in described.values()):
            raise ValueError("its inputs have different shapes in different micro-batches")
        kind, row_shape = kinds.pop()
        sizes = [described[i][slot][1][0] if i in described else 0 for i in range(num_parts)]
        whole = torch.zeros((sum(sizes), *row_shape), dtype=kind, device=device)
        pieces = torch.split(whole, sizes)
        for index, tensors in parts.items():
            pieces[index].copy_(tensors[slot])
        if num_workers() > 1:  # each row stands on one worker, all others add 0 to it
            sendable = whole.to(torch.uint8) if kind == torch.bool else whole
            dist.all_reduce(sendable)
            whole = sendable.to(kind)
        elif whole.is_floating_point():
            whole += 0  # -0.0 becomes 0.0, as it does when added up
        gathered.append(list(torch.split(whole, sizes)))
    return gathered


def _describe_parts(parts: Mapping[int, list[Tensor]]) -> dict[int, list[tuple[torch.dtype, Any]]]:
    """Type and shape of each tensor of all workers, by the index of its part."""
    own = {index: [(t.dtype, tuple(t.shape)) for t in tensors] for index, tensors in parts.items()}
    if num_workers() == 1:
        return own
    everyones: list[Any] = [None] * num_workers()
    dist.all_gather_object(everyones, own)
    return {index: facts for one in everyones for index, facts in one.items()}
