"""Whatever MLflow's server does, and whenever: training does not feel it, and the record is whole.

A real server behind a proxy. What MLflow holds at the end is compared with the journal.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest

import pipeline
from pipeline.report.build import build
from pipeline.rundir import RunDir
from pipeline.rundir.system import SystemReader
from pipeline.tracking.client import make_database
from pipeline.tracking.model import load_model
from pipeline.train import fault_injection
from tests import mlflow_server
from tests.chaos import proxy
from tests.conftest import rows
from tests.processes import FORKED

ALL = (pytest.mark.chaos, pytest.mark.timeout(3600))
PHASES = ("start", "middle", "end")
REQUESTS = {"down": 4, "slow": 3, "failing": 4, "lost": 4, "read-only": 4, "locked": 1,
            "restarted": 1}  # fmt: skip
SOME = {
    ("lost", "middle", 0),
    ("restarted", "end", 0),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[mlflow_server.Server]:
    with mlflow_server.running(tmp_path_factory.mktemp("mlflow")) as found:
        yield found


class Fault:
    """Something that goes wrong with some requests of one phase of the run."""

    def __init__(self, mode: str, phase: str, skip: int, runs: Path) -> None:
        self.mode, self.phase, self.skip, self.runs = mode, phase, skip, runs
        self.left, self.num_batches, self.struck = REQUESTS[mode], 0, 0

    def __call__(self, method: str, path: str) -> str | None:
        ended = any(self.runs.glob("*/ended.json"))
        self.num_batches += "log-batch" in path
        now = "end" if ended else "middle" if self.num_batches > 2 else "start"
        if now != self.phase or not self.left:
            return None
        if self.skip:
            self.skip -= 1
            return None
        self.left -= 1
        self.struck += 1
        return self.mode

    def wait(self, step: int) -> None:
        """Training is not at its end before this has struck there; half a minute at most."""
        if self.phase != "end" and step > 20 and self.left:
            time.sleep(0.05)


def readings_of(run: RunDir) -> dict[str, list[tuple[int, float]]]:
    """Time and value of each of the machine's readings, by the metric's name."""
    readings: dict[str, list[tuple[int, float]]] = {}
    for *_, reading in SystemReader(run.system, {}).new():
        for name, value in reading["values"].items():
            assert value is not None
            readings.setdefault(f"system/node_0/{name}", []).append((reading["time"], value))
    assert readings
    return readings


CASES = [(mode, phase, skip) for mode in proxy.MODES for phase in PHASES for skip in range(3)]


@pytest.mark.parametrize(
    ("mode", "phase", "skip"),
    [pytest.param(*c, marks=() if c in SOME else ALL, id="-".join(map(str, c))) for c in CASES],
)
def test_the_record_is_complete_after_any_fault_of_the_tracker(
    server: mlflow_server.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str,
    phase: str, skip: int,
) -> None:  # fmt: skip
    (tmp_path / "data.csv").write_text(rows())
    spec: dict[str, Any] = {
        "name": f"tracked-{mode}-{phase}-{skip}", "model": {"name": "mlp", "hidden": [8]},
        "loss": "mse",
        "data": {"train": str(tmp_path / "data.csv"), "inputs": ["a", "b"], "target": "y",
                 "validation": 0.25},
        "training": {"epochs": 200, "batch_size": 6}, "storage": str(tmp_path / "runs"),
        "optimizer": {"name": "adam", "lr": 0.01}, "schedule": "cosine",
        "tracking": {"register_as": f"model-{mode}-{phase}-{skip}"},
    }  # fmt: skip
    fault = Fault(mode, phase, skip, tmp_path / "runs")
    monkeypatch.setattr(fault_injection, "plan_faults", lambda *_: fault.wait)
    with proxy.in_front_of(server, fault) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        result = pipeline.run(spec)
    assert fault.struck
    client = mlflow.MlflowClient(server.uri)
    experiment = client.get_experiment_by_name(spec["name"])
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == result.run_id
    assert run.info.status == "FINISHED"
    for name in ("loss", "gradient_norm"):
        history = client.get_metric_history(run.info.run_id, f"train/{name}")
        wanted = [(p["step"], p["train"][name]) for p in result.curve if "train" in p]
        assert [(m.step, m.value) for m in history] == wanted
    validation = client.get_metric_history(run.info.run_id, "validation/loss")
    wanted = [(p["step"], p["validation"]["loss"]) for p in result.curve if "validation" in p]
    assert [(m.step, m.value) for m in validation] == wanted
    for name, readings in readings_of(RunDir(Path(result.storage))).items():
        history = client.get_metric_history(run.info.run_id, name)
        assert [(m.timestamp, m.value) for m in history] == readings
    assert len(run.outputs.model_outputs) == 1
    assert f"**Finished** after {result.steps} steps." in run.data.tags["mlflow.note.content"]
    folder = mlflow.artifacts.download_artifacts(
        run_id=run.info.run_id, tracking_uri=server.uri, dst_path=str(tmp_path / "artifacts")
    )
    report = build(RunDir(Path(result.storage)))
    files = {f"{one.name}.csv": one.to_csv().encode() for one in report.exhibits}
    files |= {f"{one.name}.png": one.png for one in report.exhibits if one.png is not None}
    uploaded = {path.name: path.read_bytes() for path in Path(folder, "report").iterdir()}
    assert uploaded == files
    assert len(files) > 12
    names = {path.name for path in Path(folder).iterdir() if path.is_file()}
    assert names == {"spec.yaml", "data.json", "environment.json", "report.html"}
    model = load_model(result.run_id, server.uri)
    assert len(model.predict(pd.DataFrame({"a": [1.5], "b": [2]}))) == 1
    (version,) = client.search_model_versions(f"name = '{spec['tracking']['register_as']}'")
    assert version.run_id == result.run_id
    registered = client.get_registered_model(version.name)
    assert registered.aliases == dict.fromkeys(["candidate", "champion"], version.version)
    assert result.registered == f"{version.name} version {version.version}: candidate and champion"
    recorded = json.loads((Path(result.storage) / "recorded.json").read_text())
    assert recorded["complete"]


def test_an_interrupted_database_creation_is_started_again(tmp_path: Path) -> None:
    """Half of MLflow's tables could not be repaired."""
    path = tmp_path / "mlflow.db"
    for seconds in (0.3, 1.0, 1.7):
        process = FORKED.Process(target=make_database, args=(path,))
        process.start()
        time.sleep(seconds)
        process.kill()
        process.join()
    make_database(path)
    assert [p.name for p in tmp_path.glob("*") if not p.name.startswith(".")] == [path.name]
    client = mlflow.MlflowClient(f"sqlite:///{path}")
    assert client.search_experiments(max_results=1)
