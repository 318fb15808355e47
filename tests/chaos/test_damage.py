"""Flipped bits and cut files: noticed in every kind of file, and what was before them is used."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import mlflow
import pytest

import pipeline
from tests.chaos import harness
from tests.chaos.harness import Case
from tests.conftest import Command, Write, happened

ALL = (pytest.mark.chaos, pytest.mark.timeout(3600))
KINDS = ("state.pt", "manifest.json", "curve.jsonl", "weights.pt", "done.json", "lease.json")


@pytest.fixture(scope="module")
def killed(whole: Case) -> Path:
    """A run whose workers were killed."""
    base, tree, _ = whole
    place = harness.fresh(base / "killed")
    harness.attempt({**tree, "pause": 0.02}, place, 3, None, [(1, 19)])
    return place


def damaged(content: bytes, drawn: random.Random) -> bytes:
    """Three times in four one bit is flipped, else the file is cut."""
    if drawn.random() < 0.25:
        return content[: drawn.randrange(len(content))]
    changed = bytearray(content)
    changed[drawn.randrange(len(content))] ^= 1 << drawn.randrange(8)
    return bytes(changed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "cases", [pytest.param(400, marks=ALL, id="all"), pytest.param(6, id="some")]
)
def test_damage_is_noticed_and_the_run_resumes_before_it(
    whole: Case, killed: Path, kind: str, cases: int
) -> None:
    base, tree, reference = whole
    of_finished = kind in ("weights.pt", "done.json")
    before = base / "whole" if of_finished else killed
    (newest,) = sorted((before / "checkpoints").glob("step-*"))[-1:]
    is_of_checkpoint = kind in ("state.pt", "manifest.json")
    name = f"checkpoints/{newest.name}/{kind}" if is_of_checkpoint else kind
    drawn = random.Random(kind)
    for case in range(cases):
        place = base / "run"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(before, place)
        content = (place / name).read_bytes()
        (place / name).write_bytes(damaged(content, drawn))
        harness.alone(tree, place)
        assert harness.left(place) == reference, f"case {case}"
        if is_of_checkpoint:
            problems = [event["text"] for event in happened(place, "damage")]
            assert any(newest.name in text for text in problems), f"case {case}"


@pytest.mark.parametrize(
    "name",
    [
        "record.json",
        "ended.json",
        *(pytest.param(one, marks=pytest.mark.chaos) for one in ("recorded.json", "done.json")),
    ],
)
def test_a_damaged_record_costs_nothing_but_time(name: str, job: Write, command: Command) -> None:
    """What it held is in other files, or in MLflow: none of them needs a second copy."""
    path = job({"checkpoint": {"every_steps": 2}})
    result = pipeline.run(path)
    record = Path(result.storage) / name
    content, drawn = record.read_bytes(), random.Random(name)
    for _ in range(4):
        record.write_bytes(damaged(content, drawn))
        again = pipeline.run(path)
        assert again.storage == result.storage
        assert again.run_id == result.run_id
        assert again.curve_sha256 == result.curve_sha256
        assert again.weights_sha256 == result.weights_sha256
        assert again.state == "finished"
    client = mlflow.MlflowClient(result.tracking_uri)
    (run,) = client.search_runs([client.get_run(result.run_id).info.experiment_id])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [metric.value for metric in history] == result.losses


@pytest.mark.parametrize(
    "name", ["record.json", "recorded.json", "spec.yaml", "curve.jsonl", "lease.json"]
)
def test_what_cannot_be_written_is_named(name: str, job: Write, command: Command) -> None:
    """Here a folder stands in the place of the file."""
    path = job()
    assert command("run", path)[0] == 0
    folder = path.parent / "runs" / "small-1"
    (folder / "done.json").unlink()
    (folder / name).unlink()
    (folder / name).mkdir()
    code, _, err = command("run", path)
    assert code == 1
    assert f"{folder / name}" in err
    assert "Is a directory" in err or "is a directory" in err
    assert "Traceback" not in err
