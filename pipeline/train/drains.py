"""Nodes that are to leave the cluster: workers on them save their state while there is time."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator, Mapping
from queue import SimpleQueue
from typing import Any, NamedTuple

LOOK_SECONDS = 1.0
LAST_SECONDS = 4.0
"""Before a node is gone, for the state to be saved once more."""


class Notice(NamedTuple):
    """Something that has come up while a run trains."""

    text: str
    """For the user; may be empty."""
    saves: bool = False
    """Whether the state is to be saved after the next step."""


Notices = SimpleQueue[Notice]


@contextlib.contextmanager
def watching(nodes: Mapping[str, str], notices: Notices) -> Iterator[None]:
    """A thread that gives a notice when Ray says that one of the nodes is drained.

    `nodes` are the workers' nodes: their addresses by Ray's id. Ray knows it from whoever takes the
    node away: an autoscaler, a SIGTERM to `ray start --block`, or `ray drain-node`.
    """
    over = threading.Event()

    def look() -> None:
        told: set[str] = set()
        saved: set[str] = set()
        while not over.wait(LOOK_SECONDS):
            for node in (leaving := _draining()).keys() & nodes.keys():
                left = leaving[node] / 1000 - time.time() if leaving[node] else math.inf
                if node not in told:
                    told.add(node)
                    when = f" in {left:.0f} s" if left < math.inf else ""
                    text = f"node {nodes[node]} leaves the cluster{when}: the state is saved"
                    notices.put(Notice(text, saves=True))
                elif left < LAST_SECONDS and node not in saved:
                    saved.add(node)
                    notices.put(Notice("", saves=True))

    thread = threading.Thread(target=look, name="drains", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(LOOK_SECONDS)  # it may be asking a cluster that is gone


def _draining() -> dict[str, int]:
    """When nodes are to be gone, in milliseconds since 1970, by their id; 0 where nobody says."""
    import ray

    with contextlib.suppress(Exception):  # the cluster itself may be leaving
        found: dict[str, Any] = ray._private.state.state.get_draining_nodes() or {}
        return {node: int(deadline or 0) for node, deadline in found.items()}
    return {}
