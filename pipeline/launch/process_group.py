"""Ray Train's process group, on the network that Ray itself uses between nodes.

Gloo takes the address that a node's own name resolves to, which on many systems is 127.0.0.1: no
other node can connect to that.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import psutil
import ray
import torch
from ray.train.torch import TorchConfig

from pipeline.errors import UsageError

INTERFACE = "GLOO_SOCKET_IFNAME"


def use_the_nodes_interface() -> None:
    """Let gloo use the network interface with the node's address; a user's own setting holds."""
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == address for one in addresses):
            os.environ.setdefault(INTERFACE, name)
            return


def refuse_without_gpu() -> None:
    """Raise UsageError in a worker to which Ray has given a GPU that torch cannot use."""
    if not torch.cuda.is_available():
        built = "without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
        raise UsageError(
            f"workers.gpu: torch {torch.__version__} on node {ray.util.get_node_ip_address()}, "
            f"built {built}, finds no GPU; Ray has given this worker one"
        )


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]
    """Ray's own, with the interface chosen before where there are several nodes."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        if backend_config.backend == "nccl":
            worker_group.execute(refuse_without_gpu)
        if len(set(worker_group.execute(ray.util.get_node_ip_address))) > 1:
            worker_group.execute(use_the_nodes_interface)
        super().on_start(worker_group, backend_config)


@dataclass
class ReachableTorchConfig(TorchConfig):  # type: ignore[misc]
    """A TorchConfig whose workers reach each other on other nodes too."""

    @property
    def backend_cls(self) -> type[Any]:
        """What sets the process group up."""
        return _Backend
