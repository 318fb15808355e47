"""A run on a real Ray cluster that grows and shrinks under it, and the same bits all the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlflow
import pytest

import pipeline
from pipeline.rundir.journal import Reader
from tests.conftest import Write, happened

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


@pytest.fixture
def cluster() -> Iterator[Any]:
    with made_cluster() as made:
        yield made


def sizes(folder: Path) -> list[int]:
    """Numbers of workers that have started on the run, in order."""
    return [event["workers"] for event in happened(folder, "start")]


def until(said: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not said():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.2)


@pytest.mark.ray
def test_a_cluster_that_grows_and_shrinks_changes_no_bit(
    job: Write, tmp_path: Path, cluster: Any
) -> None:
    brake = tmp_path / "brake"
    (tmp_path / "braked.py").write_text(BRAKED)
    path = job({
        "model": {"name": "braked", "brake": str(brake)}, "optimizer": {"name": "adamw"},
        "training": {"epochs": 300, "batch_size": 10, "microbatch_size": 2},
        "workers": {"min": 1, "max": 4}, "checkpoint": {"every_steps": 5},
    })  # fmt: skip
    imports = [str(tmp_path / "braked.py")]
    alone = pipeline.run(path, {"workers": {"num": 1}}, imports)

    brake.touch()
    runs = tmp_path / "elastic"
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "run", str(path), "--import", imports[0],
         "--set", f"storage={runs}", "--json"],
        env=os.environ | {"RAY_ADDRESS": cluster.address},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip

    def grown_to(expected: list[int]) -> Callable[[], bool]:
        def said() -> bool:
            (folder,) = list(runs.glob("small-*")) or [tmp_path]
            points = list(Reader(folder / "curve.jsonl").new())
            is_past = bool(points) and "event" not in points[-1]
            return is_past and sizes(folder) == expected

        return said

    until(grown_to([2]), process)
    node = cluster.add()
    until(grown_to([2, 4]), process)
    cluster.remove_node(node, allow_graceful=False)
    until(grown_to([2, 4, 2]), process)
    brake.unlink()
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "resuming from step" in err
    result = json.loads(out.splitlines()[-1])
    assert result["curve_sha256"] == alone.curve_sha256
    assert result["weights_sha256"] == alone.weights_sha256
    assert result["metrics"] == alone.metrics
    client = mlflow.MlflowClient(result["tracking_uri"])
    metrics = client.get_run(result["run_id"]).data.metrics
    nodes = {key.split("/")[1] for key in metrics if key.startswith("system/node_")}
    assert nodes == {"node_0"}  # this machine, once, however many nodes Ray has on it
