"""A Ray cluster whose nodes come and go, and a model that lets a test keep up with a run."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

BRAKED = '''
"""A model that takes its time while a file is there, so that a test can resize the cluster."""

import time
from pathlib import Path

from torch import nn

import pipeline
from pipeline.models.parts import Features, Outputs


@pipeline.models.register("braked")
class Braked(nn.Module):
    """Two layers with dropout, and a brake."""

    def __init__(self, inputs, outputs, *, brake: str, width: int = 16):
        super().__init__()
        self.features, self.brake = Features(inputs), Path(brake)
        self.hidden = nn.Linear(self.features.width, width)
        self.dropout = nn.Dropout(0.2)
        self.outputs = Outputs(width, outputs)

    def forward(self, batch):
        if self.training and self.brake.exists():
            time.sleep(0.05)
        return self.outputs(self.dropout(self.hidden(self.features(batch)).relu()))
'''


@contextmanager
def made_cluster() -> Iterator[Any]:
    """A Ray cluster of nodes with two CPUs each, on this machine."""
    from ray.cluster_utils import Cluster

    memory = 100 * 2**20
    head = {"num_cpus": 2, "object_store_memory": memory, "include_dashboard": False}
    with patch.dict(os.environ, {"RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}):
        made = Cluster(initialize_head=True, head_node_args=head)
        made.add = lambda: made.add_node(num_cpus=2, object_store_memory=memory)
        try:
            yield made
        finally:
            made.shutdown()


def until(
    said: Callable[[], bool], process: subprocess.Popen[str] | None = None, seconds: float = 180
) -> None:
    """Wait for something that happens while the process runs."""
    deadline = time.monotonic() + seconds
    while not said():
        assert process is None or process.poll() is None, process and process.communicate()
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.2)
