"""Hostile job specs: refused in words or taken, but no code of theirs runs and no file appears."""

from __future__ import annotations

import copy
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.errors import PipelineError
from pipeline.launch.resume import Runs
from pipeline.spec import load
from pipeline.tracking.names import params
from tests import s3
from tests.conftest import Command, Write

CANARY = "canary-7c1e"
VALUES: list[Any] = [
    None, True, -1, 0, 2**63, 10**400, 1e308, float("nan"), float("inf"), "", " ", "\x00", "\u202e",
    "../../" + CANARY, "/" + CANARY, "~/" + CANARY, "a" * 10_000, "🚀" * 300, "-" * 300, [], {},
    [[[[[]]]]], {"name": {"name": {}}}, {"__class__": "x"}, f"$(touch {CANARY})", "a\nb", "a/b",
    f"`touch {CANARY}`", "{{7*7}}", "%s%n", "s3://k:s@b/x", "file:///etc/passwd",
    f"__import__('os').system('touch {CANARY}')",
]  # fmt: skip
TAGS = [
    f"!!python/object/apply:os.system ['touch {CANARY}']",
    f"!!python/object/new:os.system ['touch {CANARY}']",
    "!!python/name:os.system ''", "!!python/module:os ''", "!!python/tuple [1]", "!!binary aGk=",
    "!include /etc/passwd", "*nobody", "&a [*a]", "!!set {a}", "!!omap [a: 1]", "? complex\n: key",
]  # fmt: skip
SPEC: dict[str, Any] = {
    "name": "small", "data": {"train": "data.csv", "target": "y", "validation": 0.2},
    "model": {"name": "mlp", "hidden": [4]}, "loss": [{"name": "huber", "delta": 1.0}],
    "optimizer": {"name": "adam", "lr": 0.01}, "schedule": {"name": "cosine", "warmup_steps": 2},
    "training": {"epochs": 2, "batch_size": 8, "microbatch_size": 2, "clip_norm": 1.0},
    "metrics": ["r2"], "workers": {"num": 1}, "checkpoint": {"every_steps": 5, "keep": 2},
    "tracking": {"experiment": "e", "register_as": "m"}, "storage": "runs",
}  # fmt: skip


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Each mapping or list in the tree with each of its keys."""
    keys: list[Any] = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    found = [(tree, key) for key in keys]
    for key in keys:
        if isinstance(tree[key], dict | list):
            found += places(tree[key])
    return found


def fuzzed(drawn: random.Random) -> str:
    """A job spec with something odd in it, as text."""
    tree = copy.deepcopy(SPEC)
    for _ in range(drawn.randint(1, 3)):
        node, key = drawn.choice(places(tree))
        kind = drawn.random()
        if kind < 0.6:
            node[key] = drawn.choice(VALUES)
        elif kind < 0.75 and isinstance(node, dict):
            node[str(drawn.choice(VALUES))] = drawn.choice(VALUES)
        else:
            del node[key]
        if not tree:
            break
    text = yaml.safe_dump(tree, allow_unicode=True)
    if drawn.random() < 0.3:
        lines = text.splitlines()
        line = drawn.randrange(len(lines))
        lines[line] = lines[line].partition(":")[0] + ": " + drawn.choice(TAGS)
        text = "\n".join(lines)
    if drawn.random() < 0.2:
        place = drawn.randrange(len(text))
        text = text[:place] + chr(drawn.randrange(1, 0x2FF)) + text[place + 1 :]
    return text


def test_two_thousand_fuzzed_specs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    monkeypatch.setenv("HOME", str(tmp_path / "a"))
    drawn, taken, longest = random.Random(0), 0, 0
    for _ in range(2000):
        text = fuzzed(drawn)
        path = inside / "job.yaml"
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        try:
            spec = load(path)
        except PipelineError as error:
            longest = max(longest, len(str(error)))
            continue
        taken += 1
        for key, value in params(spec).items():
            assert "k:s@b" not in value, key
        inside_runs = spec.model_copy(update={"storage": str(inside / "runs")})
        assert Runs(inside_runs).new().path.parent == inside / "runs"
        assert yaml.safe_load(spec.dump())["name"] == spec.name
    assert 20 < taken < 1500
    assert longest < 20_000, "an error that nobody can read"
    found = {path.name for path in tmp_path.rglob("*") if CANARY in path.name}
    assert not found
    assert sorted(os.listdir(tmp_path)) == ["a"]
    assert not Path("/" + CANARY).exists()


def test_a_spec_of_fifty_megabytes_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("name: a\nx: [" + "1, " * (17 * 2**20) + "]\n")
    with pytest.raises(PipelineError, match="larger than 1 MB"):
        load(path)


@pytest.mark.parametrize("text", ["[", "{a: ", "- "])
def test_a_deeply_nested_spec_is_refused_at_once(tmp_path: Path, text: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("name: a\nx:\n " + text * (800_000 // len(text)))
    before = time.monotonic()
    with pytest.raises(PipelineError, match="nested deeper than 50 levels"):
        load(path)
    assert time.monotonic() - before < 5


def test_a_part_of_mlflows_address_is_no_way_to_its_secrets(
    job: Write, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error names the path and query of the address alone."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://u:hunter2 5b1d@127.0.0.1:9/p?token=T0KEN-99")
    monkeypatch.setenv("PIPELINE_UPLOAD_PATIENCE_SECONDS", "1")
    path = job()
    code, out, err = command("run", path, "--json")
    assert code == 3, err
    assert (path.parent / "runs/small-1/upload.log").read_text(), "it said something"
    told = [file.read_bytes() for file in path.parent.rglob("*") if file.is_file()]
    for secret in ("hunter2", "5b1d", "T0KEN-99"):
        assert secret not in out + err
        assert not [1 for content in told if secret.encode() in content]


def test_no_secret_is_left_anywhere(
    job: Write, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In the data's URI, the copy's and MLflow's: not on the terminal, in files, or in MLflow."""
    secret = "hunter2-5b1d"
    database = tmp_path / "mlflow.db"
    with s3.running(tmp_path_of(tmp_path, "s3"), secret) as server:
        path = job()
        table = (path.parent / "data.csv").read_bytes()
        with server.filesystem.open_output_stream("rows/data.csv") as file:
            file.write(table)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
        changes = {
            "data.train": server.uri("rows/data.csv"),
            "workers.num": 2,
            "checkpoint.every_steps": 2,
            "checkpoint.copy_to": server.uri("rows/copies"),
        }
        given = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
        code, out, err = command("run", path, *given, "--json")
        assert code == 0, err
        assert secret not in out + err
        code, out, err = command("run", path, *given, "--set", "data.target=nobody")
        assert code == 2
        assert secret not in out + err
        places = [path.parent, tmp_path, Path("/tmp/ray/session_latest/logs")]
        hits = [
            file for place in places for file in place.rglob("*")
            if file.is_file() and "s3" not in file.relative_to(place).parts[:1]
            and secret.encode() in file.read_bytes()
        ]  # fmt: skip
        assert not hits


def tmp_path_of(base: Path, name: str) -> Path:
    """A folder below."""
    (base / name).mkdir()
    return base / name
