"""Flipped bits and cut files: noticed in every kind of file, and what was before them is used."""

from __future__ import annotations

import contextlib
import random
import shutil
from pathlib import Path

import pytest

from pipeline.train import files
from pipeline.train.curve import Reader
from tests.chaos import harness
from tests.chaos.harness import Case
from tests.conftest import Command, Write

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
def test_damage_is_noticed_and_gone_on_from(
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
        said = [
            p["text"] for p in Reader(place / "curve.jsonl").new() if p.get("event") == "damage"
        ]
        if is_of_checkpoint:
            assert any(newest.name in text for text in said), f"case {case}"


@pytest.mark.parametrize("name", [files.RECORD, files.RECORDED, files.ENDED, files.DONE])
def test_what_is_written_twice_survives_damage_of_one(tmp_path: Path, name: str) -> None:
    value = {"step": 7, "delivered": {"train": 7}, "tags": {"pipeline.run": "f" * 32}, "rate": 1e-5}
    drawn = random.Random(0)
    for _ in range(400):
        files.write_json(tmp_path / name, value)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(damaged(content, drawn))
        assert files.read_json(tmp_path / name) == value
        copy = tmp_path / f".{name}.copy"
        copy.write_bytes(damaged(copy.read_bytes(), drawn))
        with contextlib.suppress(ValueError):
            assert files.read_json(tmp_path / name) == value  # as 1E-5 is 1e-5


@pytest.mark.parametrize(
    "name", ["record.json", "recorded.json", "spec.yaml", "curve.jsonl", "lease.json"]
)
def test_what_cannot_be_written_is_named(name: str, job: Write, command: Command) -> None:
    """Here a folder stands in the place of the file."""
    path = job()
    assert command("run", path)[0] == 0
    folder = path.parent / "runs" / "small-1"
    (folder / "done.json").unlink()
    (folder / ".done.json.copy").unlink()
    (folder / name).unlink()
    (folder / name).mkdir()
    code, _, err = command("run", path)
    assert code == 1
    assert f"{folder / name}" in err
    assert "Is a directory" in err or "is a directory" in err
    assert "Traceback" not in err
