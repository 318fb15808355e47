"""What tests share: a small table, a spec over it, and the command in this process."""

from __future__ import annotations

import multiprocessing.process
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
import yaml

import pipeline
from pipeline import cli, registry
from pipeline.rundir import RunDir
from pipeline.rundir.journal import Reader, events

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
hypothesis.settings.register_profile("shared machine", deadline=None)
hypothesis.settings.load_profile("shared machine")
if "PYTEST_XDIST_WORKER" in os.environ:  # each process of tests has one core
    torch.set_num_threads(1)
JOBS = Path(__file__).parent.parent / "jobs"
FAST = (
    "checks",
    "data",
    "distributed",
    "files",
    "losses",
    "models",
    "probes",
    "report",
    "rundir",
    "spec",
    "telemetry",
    "test_optimizers",
    "test_redact",
    "test_registry",
    "test_schedules",
    "test_structure",
    "test_testing",
    "train",
)
"""Folders and modules of the fast lane."""

MINIMAL = {
    "name": "x",
    "data": {"train": "sample:diabetes", "target": "progression"},
    "model": "linear",
    "loss": "mse",
}
"""The least that a job spec says."""

Write = Callable[..., Path]
Command = Callable[..., tuple[int, str, str]]


def built_in(kind: str) -> list[str]:
    """Names of the package's own entries: other test modules register theirs when imported."""
    entries = registry.REGISTRIES[kind].entries.items()
    return sorted(name for name, entry in entries if entry.origin[0].startswith("pipeline."))


def merged(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The tree with dotted `changes`; a value of None takes the key out."""
    for path, value in changes.items():
        node = tree
        *parents, last = path.split(".")
        for key in parents:
            node = node.setdefault(key, {})
        if value is None:
            node.pop(last, None)
        else:
            node[last] = value
    return tree


def rows(num_rows: int = 24) -> str:
    """A CSV of whole numbers, amounts, text and classes."""
    lines = ["a,b,color,kind,flag,y"]
    for i in range(num_rows):
        color = ["red", "green", "blue"][i % 3]
        flag = ["true", "false"][i % 2]
        lines.append(f"{i}.5,{(i * 7) % 11},{color},{i % 3},{flag},{2 * i + 1}.25")
    return "\n".join(lines) + "\n"


def happened(folder: Path, event: str) -> list[dict[str, Any]]:
    """Lines of a run's journal on one kind of event."""
    return [dict(line) for line in events(Reader(RunDir(folder).journal)) if line["event"] == event]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of the fast lane."""
    for item in items:
        is_fast = str(item.path.relative_to(Path(__file__).parent)).startswith(FAST)
        marks = {mark.name for mark in item.iter_markers()}
        if is_fast and not marks & {"processes", "ray", "jobs", "chaos"}:
            item.add_marker("fast")


@pytest.fixture(autouse=True)
def _the_fast_lane_starts_no_process(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("a test of the fast lane starts a process: mark it with `processes`")

    if request.node.get_closest_marker("fast"):
        monkeypatch.setattr(subprocess, "Popen", refuse)
        monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refuse)


@pytest.fixture(autouse=True, scope="session")
def _uploaders_are_forked() -> None:
    from tests.warm import fork_uploaders

    fork_uploaders()


@pytest.fixture(autouse=True, scope="session")
def _rows_are_kept_apart(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Conversions of these tests' rows, away from the user's own."""
    os.environ["PIPELINE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@contextmanager
def environment_of_its_own() -> Iterator[None]:
    """Undo what is done to the environment; `mlflow.set_tracking_uri` sets a variable too."""
    before = dict(os.environ)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    yield
    for key in os.environ.keys() - before.keys():
        del os.environ[key]
    for key, value in before.items():
        if os.environ.get(key) != value:
            os.environ[key] = value


@pytest.fixture(autouse=True, scope="module")
def _modules_leave_the_environment_as_it_was() -> Iterator[None]:
    with environment_of_its_own():
        yield


@pytest.fixture(autouse=True)
def _tests_leave_the_environment_as_it_was() -> Iterator[None]:
    with environment_of_its_own():
        yield


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables in a file of SQLite, still empty: to make them takes over a second."""
    from pipeline.tracking.client import make_database

    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    make_database(path)
    return path


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray cluster of this process for all runs of a module, which start one each otherwise."""
    from pipeline.launch.ray_cluster import session

    with session(pipeline.load(MINIMAL | {"workers": {"num": 4}})):
        yield


@pytest.fixture
def job(tmp_path: Path, database: Path) -> Write:
    """Writes `job.yaml` with changes to a small valid spec, and its data beside it.

    Runs are recorded in a database that is there already.
    """

    def write(changes: dict[str, Any] | None = None, data: str | None = None) -> Path:
        (tmp_path / "data.csv").write_text(data if data is not None else rows())
        if not (tmp_path / "runs").exists():
            (tmp_path / "runs").mkdir()
            shutil.copy(database, tmp_path / "runs")
        tree: dict[str, Any] = {
            "name": "small",
            "data": {"train": "data.csv", "validation": 0.25, "inputs": ["a", "b"], "target": "y"},
            "model": {"name": "linear"},
            "loss": {"name": "mse"},
            "optimizer": {"name": "sgd", "lr": 0.01},
            "training": {"epochs": 2, "batch_size": 8},
            "storage": str(tmp_path / "runs"),
        }
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump(merged(tree, changes or {}), sort_keys=False))
        return path

    return write


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `pipeline ARGUMENTS` in this process: exit code, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["pipeline", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as done:
            code = int(done.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run
