"""The shape of the code: what imports what, what is public, what is quick."""

from __future__ import annotations

import ast
import importlib
import pickle
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import pipeline
from pipeline import errors

PACKAGE = Path(pipeline.__file__).parent
ROOT = Path(__file__).parent.parent

LAYERS = [
    ["errors", "redact", "registry", "tracebacks", "files"],
    ["spec", "plugins"],
    ["data"],
    ["losses"],
    ["models", "optimizers", "schedules", "metrics"],
    ["probes"],
    ["distributed"],
    ["rundir"],
    ["telemetry"],
    ["train"],
    ["report", "inference"],
    ["tracking"],
    ["checks", "testing"],
    ["launch"],
    ["verify", "cluster"],
    ["kubernetes"],
    ["render", "cli", "", "__main__"],
]
"""Folders, and modules beside them: lower lines may import from upper ones, never the reverse."""
DEPTH = {name: depth for depth, layer in enumerate(LAYERS) for name in layer}
RAY = {
    "cluster.client",
    "launch.gauges",
    "launch.ray_cluster",
    "launch.ray_trainer",
    "launch.failures",
    "launch.process_group",
    "train.drains",
    "train.nodes",
    "train.worker",
}
MLFLOW = {"tracking.champion", "tracking.client", "tracking.model", "tracking.serving"}
LONGEST = 400


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        name = "" if name == "__init__" else name.removesuffix(".__init__")
        found[name] = ast.parse(path.read_text())
    return found


def imported(tree: ast.Module) -> set[str]:
    """Names of modules imported anywhere in the file, except for type checking only."""
    skipped = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and ast.unparse(test.test) == "TYPE_CHECKING"
        for part in test.body
        for node in ast.walk(part)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def test_imports_point_one_way() -> None:
    everything = modules()
    graph: dict[str, set[str]] = {}
    for name, tree in everything.items():
        layer = name.partition(".")[0]
        assert layer in DEPTH, f"give {layer} a layer"
        ours = {t.removeprefix("pipeline.") for t in imported(tree) if t.startswith("pipeline.")}
        graph[name] = ours & (everything.keys() - {"", name})
        for target in graph[name]:
            depth = DEPTH[target.partition(".")[0]]
            assert depth <= DEPTH[layer], f"{name} imports {target}, which is above it"
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_each_module_has_tests_of_its_name_or_a_row_that_says_where() -> None:
    text = (ROOT / "tests" / "README.md").read_text().partition("| module | its tests |")[2]
    rows = [line.split(" | ") for line in text.partition("\n\n")[0].splitlines()[2:]]
    elsewhere = [place for modules, _ in rows for place in re.findall(r"`(.+?)`", modules)]
    for path in [path for _, tests in rows for path in re.findall(r"`(.+?)`", tests)]:
        assert (ROOT / path).exists(), path
    for path in PACKAGE.rglob("*.py"):
        module = path.relative_to(PACKAGE)
        if path.name.startswith("__"):
            continue
        has_test = (ROOT / "tests" / module.parent / f"test_{path.name}").exists()
        is_listed = any(f"{module}".startswith(place) for place in elsewhere)
        assert has_test or is_listed, f"no test_{path.name}, nor a row in tests/README.md: {module}"
        assert not (has_test and str(module) in elsewhere), f"{module} has a test of its name"


def test_no_file_is_longer_than_can_be_read() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= LONGEST, path.relative_to(PACKAGE)


def test_ray_and_mlflow_are_imported_in_their_rooms_only() -> None:
    for name, tree in modules().items():
        tops = {target.partition(".")[0] for target in imported(tree)}
        assert "ray" not in tops or name in RAY, name
        assert "mlflow" not in tops or name in MLFLOW, name


@pytest.mark.processes
@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["list", "losses"], ["check", "no.yaml"]]
)
def test_nothing_heavy_is_imported_to_answer(arguments: list[str]) -> None:
    code = (
        "import sys; sys.argv = ['pipeline', *sys.argv[1:]]\n"
        "from pipeline.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'mlflow', 'pandas', 'pyarrow', 'sklearn'} & set(sys.modules)\n"
        "print('heavy:', sorted(heavy))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert "heavy: []" in done.stdout


@pytest.mark.processes
def test_a_check_leaves_torchs_compiler_alone() -> None:
    code = (
        "import sys, pipeline; pipeline.check(sys.argv[1])\n"
        "print('compiler:', 'torch._dynamo' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "jobs" / "diabetes.yaml")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "compiler: False" in done.stdout


def test_the_public_names_are_these() -> None:
    assert pipeline.__all__ == [
        "JobSpec", "Result", "__version__", "check", "load", "losses", "metrics", "models",
        "optimizers", "run", "run_folds", "schedules",
    ]  # fmt: skip


@pytest.mark.processes
@pytest.mark.parametrize("name", ["losses", "metrics", "models", "optimizers", "schedules"])
def test_every_registry_takes_entries_whatever_was_imported_before(name: str) -> None:
    for module in modules():
        if module not in ("__main__", "tracking.serving"):
            importlib.import_module(f"pipeline.{module}" if module else "pipeline")
    registry = getattr(pipeline.registry, name)
    getattr(pipeline, name).register(f"t_any_{name}")(lambda: None)
    assert f"t_any_{name}" in registry.entries
    del registry.entries[f"t_any_{name}"]


@pytest.mark.parametrize(
    "error",
    [
        errors.SpecError("job.yaml", [errors.Fault("data.train", "missing", 3, "add it")]),
        errors.DataError("data.train: no rows"),
        errors.ContractError("mse", "shapes differ", "squeeze"),
        errors.NonFiniteError(7, float("inf"), {"mse": float("nan")}),
    ],
    ids=lambda e: type(e).__name__,
)
def test_errors_keep_their_facts_between_processes(error: errors.PipelineError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert type(again) is type(error)
    assert again.exit_code == error.exit_code
