"""A submitted job whose cluster grows, shrinks, loses its head and gets another."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow
import pytest

import pipeline
from pipeline.rundir import RunDir
from pipeline.rundir.journal import Reader
from tests.clusters import BRAKED, until
from tests.conftest import happened, rows
from tests.ray_head import running_head, running_node
from tests.scenarios.test_submit import ran, started, steps_of

pytestmark = pytest.mark.ray
JOB = """
name: changes
data: {{train: rows.csv, validation: 0.2, inputs: [a, b], target: y}}
model: {{name: braked, brake: {brake}}}
loss: mse
training: {{epochs: 300, batch_size: 10, microbatch_size: 2}}
workers: {{min: 1, max: 3, cpus_per_worker: 3}}
checkpoint: {{every_steps: 5}}
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A job that needs three CPUs a worker, and goes on in earnest when its brake is gone."""
    (tmp_path / "rows.csv").write_text(rows())
    (tmp_path / "braked.py").write_text(BRAKED)
    (tmp_path / "job.yaml").write_text(JOB.format(brake=tmp_path / "brake"))
    return tmp_path / "job.yaml"


def test_bits_and_record_are_the_local_runs(job: Path, tmp_path: Path) -> None:
    brake, imports = tmp_path / "brake", ["--import", tmp_path / "braked.py"]
    alone = pipeline.run(
        str(job), {"workers": {"num": 1}, "storage": str(tmp_path / "alone")}, [str(imports[1])]
    )
    brake.touch()
    home = tmp_path / "home"
    home.mkdir()

    def sizes() -> list[int]:
        """Numbers of workers that have started on the run and made a step, in order."""
        for folder in home.glob("runs/changes-*"):
            points = list(Reader(RunDir(folder).journal).new())
            if points and "event" not in points[-1]:
                return [event["workers"] for event in happened(folder, "start")]
        return []

    command = ["submit", job, *imports, "--yes", "--json"]
    with running_head(home) as head:
        first = started(head, *command)
        until(lambda: sizes() == [1], first)
        with running_node(head, cpus=3), running_node(head, cpus=3):
            until(lambda: sizes() in ([1, 3], [1, 2, 3]), first)
            grown = len(sizes())
        until(lambda: sizes()[grown:] in ([1], [2, 1]), first)
        head.kill()
    with running_head(home, before=head) as head:
        _, err = first.communicate(timeout=120)
        assert first.returncode == 1, err
        assert "; asking again for " in err
        assert "does not know changes-" in err
        assert err.splitlines()[-1].endswith("the same `pipeline submit` resumes the run")
        brake.unlink()
        code, out, err = ran(head, *command)
    assert code == 0, err
    assert "resuming from step" in err
    result = json.loads(out)
    assert result["curve_sha256"] == alone.curve_sha256
    assert result["weights_sha256"] == alone.weights_sha256
    assert result["metrics"] == alone.metrics
    assert sorted(steps_of(result)) == list(range(1, result["steps"] + 1))
    metrics = mlflow.MlflowClient(result["tracking_uri"]).get_run(result["run_id"]).data.metrics
    nodes = {key.split("/")[1] for key in metrics if key.startswith("system/node_")}
    assert nodes == {"node_0"}  # this machine, once, however many nodes Ray has on it
