"""What workers need of a cluster, and whether its nodes have it: in all, and free by now."""

from __future__ import annotations

import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.errors import RunError, UsageError
from pipeline.spec.sections import Workers

GIB = 2**30
LOOK_SECONDS = 2.0
MAX_NAMED = 4
"""Nodes that are told apart in a message; of more, how many there are of each kind."""
NAMES = {"CPU": "CPUs", "GPU": "GPUs", "memory": "GiB"}


@dataclass(frozen=True)
class Node:
    """A node of a cluster, by what Ray says of it."""

    name: str
    total: Mapping[str, float]
    """Amount of each resource."""
    free: Mapping[str, float]
    """What nobody holds of it now."""
    labels: Mapping[str, str]


def needs(workers: Workers) -> dict[str, float]:
    """Amount of each of Ray's resources that one worker takes."""
    amounts = {"CPU": workers.cpus_per_worker, **workers.resources}
    if workers.gpu:
        amounts["GPU"] = 1.0
    if workers.gib_per_worker:
        amounts["memory"] = math.ceil(workers.gib_per_worker * GIB)
    if workers.accelerator:
        amounts[f"accelerator_type:{workers.accelerator}"] = 0.001  # as Ray counts a type
    return amounts


def room(workers: Workers, nodes: Sequence[Node], is_now: bool = False) -> int:
    """How many workers the nodes hold: in all, or beside what others hold now.

    A worker stands on one node: what is left over on several of them is of no use to it.
    """
    by_node = [
        _fitting(needs(workers), node.free if is_now else node.total)
        for node in nodes
        if all(_matches(node.labels.get(key), asked) for key, asked in workers.labels.items())
    ]
    if workers.placement == "strict_pack":
        return max(by_node, default=0)
    if workers.placement == "strict_spread":
        return sum(number > 0 for number in by_node)
    return sum(by_node)


def _fitting(wanted: Mapping[str, float], held: Mapping[str, float]) -> int:
    """How often what is wanted is held, in the ten-thousandths that Ray counts in."""
    return min(
        round(held.get(key, 0.0) * 10_000) // max(round(amount * 10_000), 1)
        for key, amount in wanted.items()
    )


def _matches(value: str | None, asked: str) -> bool:
    """Whether a node's label is what a selector asks for: `a`, `!a`, `in(a, b)` or `!in(a, b)`."""
    is_other = asked.startswith("!")
    plain = asked.removeprefix("!")
    several = re.fullmatch(r"in\((.*)\)", plain)
    values = [part.strip() for part in several[1].split(",")] if several else [plain]
    return (value in values) != is_other


def refuse_too_small(workers: Workers, nodes: Sequence[Node]) -> None:
    """Raise UsageError for a cluster that can never hold the workers: they would wait for ever."""
    if may_grow() or room(workers, nodes) >= workers.least:
        return
    raise UsageError(f"workers: {shortage(workers, nodes)}")


def shortage(workers: Workers, nodes: Sequence[Node], is_now: bool = False) -> str:
    """What is wanted, what there is and on which nodes."""
    fitting = room(workers, nodes, is_now)
    has = f"there is room for {fitting} now" if is_now else f"the cluster has room for {fitting}"
    held = [(node.name, _amounts(workers, node.free if is_now else node.total)) for node in nodes]
    if len(held) <= MAX_NAMED:
        there = "; ".join(f"{text} on {name}" for name, text in held)
    else:
        kinds = Counter(text for _, text in held).most_common(MAX_NAMED)
        there = "; ".join(f"{text} on each of {count} nodes" for text, count in kinds)
    labels = ", ".join(f"{key}: {value}" for key, value in workers.labels.items())
    only = f" on nodes with {labels}" if labels else ""
    only += f", {workers.placement}" if workers.placement.startswith("strict") else ""
    return (
        f"{workers.least} x {_amounts(workers, needs(workers))}{only}; {has}: {there or 'no node'}"
    )


def _amounts(workers: Workers, held: Mapping[str, float]) -> str:
    """Amounts of what a worker needs, in words."""
    parts = []
    for key in needs(workers):
        amount = held.get(key, 0.0)
        if key.startswith("accelerator_type:"):
            parts.append(f"{'' if amount else 'no '}{workers.accelerator}")
        else:
            number = amount / GIB if key == "memory" else amount
            shown = f"{number:.4g}" if number < 1000 else f"{number:.0f}"
            name = NAMES.get(key, key)
            is_one = shown == "1" and key in NAMES
            parts.append(f"{shown} {name.removesuffix('s') if is_one else name}")
    return ", ".join(parts)


def wait_for_room(
    workers: Workers, nodes: Callable[[], Sequence[Node]], tell: Callable[[str], None]
) -> None:
    """Wait until others have left enough of the cluster; `tell` is told what is missing.

    Raises RunError when that takes longer than `workers.wait`.
    """
    started = time.monotonic()
    while room(workers, now := nodes(), is_now=True) < workers.least:
        waited = time.monotonic() - started
        missing = shortage(workers, now, is_now=True)
        if waited > workers.wait_seconds:
            raise RunError(f"workers: waited {workers.wait} for {missing}")
        tell(f"waiting for {missing}")
        time.sleep(LOOK_SECONDS)


def has_cluster() -> bool:
    """Whether there is a cluster to put workers on, beside this machine."""
    return "RAY_ADDRESS" in os.environ


def may_grow() -> bool:
    """Whether an autoscaler may add nodes; KubeRay sets this in a head that has one."""
    asked = {key.upper(): value for key, value in os.environ.items()}
    return asked.get("RAY_ENABLE_AUTOSCALER_V2", "0").lower() not in ("", "0", "false")
