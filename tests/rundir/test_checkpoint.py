"""Checkpoints: the newest intact one is loaded, whatever a crash or a damaged disk has left."""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import registry
from pipeline.errors import RunError
from pipeline.files.atomic import temporary_path
from pipeline.rundir import RunDir, checkpoint
from pipeline.rundir.lease import Lease
from pipeline.rundir.records import Identity
from pipeline.train.state import TrainState
from tests.conftest import built_in


def saved(folder: Path, steps: Sequence[int] = (5, 10), keep: int = 3) -> checkpoint.Checkpoints:
    """A run's folder with checkpoints of a small state."""
    from pipeline.spec import Checkpoint

    run = RunDir(folder)
    run.checkpoints.mkdir(exist_ok=True)
    made = checkpoint.Checkpoints(run, Checkpoint(keep=keep), IDENTITY)
    for step in steps:
        made.save(step, {"weights": {"w": torch.full((50,), float(step))}}, lambda: None)
    made.wait()
    return made


IDENTITY = Identity(spec="a", data="b", bits={})


def test_the_newest_checkpoint_is_taken_and_old_ones_go(tmp_path: Path) -> None:
    saved(tmp_path, range(5, 30, 5), keep=2)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-0000000020", "step-0000000025"]
    assert checkpoint.newest(RunDir(tmp_path), IDENTITY) == (25, [])
    assert checkpoint.load(RunDir(tmp_path), 25)["weights"]["w"][0] == 25


def test_checkpoints_of_another_version_are_told_from_damaged_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path)
    monkeypatch.setattr(checkpoint, "FORMAT", 1)
    saved(tmp_path)
    (run.checkpoint(5) / "manifest.json").write_bytes(b"torn")
    assert checkpoint.other_format(run) is None
    monkeypatch.undo()
    assert checkpoint.other_format(run) == 1
    assert checkpoint.newest(run, IDENTITY)[0] == 0
    saved(tmp_path, [15])
    assert checkpoint.other_format(run) is None


@pytest.mark.parametrize("file", ["state.pt", "manifest.json"])
def test_flipped_bits_and_truncation_are_noticed_and_the_one_before_is_taken(
    file: str, tmp_path: Path
) -> None:
    saved(tmp_path)
    path = tmp_path / "checkpoints" / "step-0000000010" / file
    whole = path.read_bytes()
    drawn = random.Random(0)
    for _ in range(100):
        place, bit = drawn.randrange(len(whole)), drawn.randrange(8)
        flipped = bytearray(whole)
        flipped[place] ^= 1 << bit
        path.write_bytes(flipped)
        step, skipped = checkpoint.newest(RunDir(tmp_path), IDENTITY)
        if file == "manifest.json" and step == 10 and not whole[place : place + 1].strip():
            continue  # other white space says the same
        assert step == 5
        assert "skipped" in skipped[0]
    for end in drawn.sample(range(len(whole)), 50):
        path.write_bytes(whole[:end])
        assert checkpoint.newest(RunDir(tmp_path), IDENTITY)[0] == 5


def test_a_checkpoint_of_another_job_is_skipped(tmp_path: Path) -> None:
    saved(tmp_path)
    step, skipped = checkpoint.newest(
        RunDir(tmp_path), IDENTITY.model_copy(update={"spec": "other"})
    )
    assert step == 0
    assert "another spec" in skipped[0]


def test_what_a_killed_writer_left_behind_is_removed(tmp_path: Path) -> None:
    temporary = temporary_path(tmp_path / "checkpoints" / "step-0000000005")
    temporary.mkdir(parents=True)
    (temporary / "state.pt").write_bytes(b"half")
    Lease.take(RunDir(tmp_path), is_own_process=False)
    saved(tmp_path, [10])
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-0000000010"]


def test_a_superseded_attempt_leaves_its_successors_checkpoint(
    tmp_path: Path,
) -> None:
    """It looks at the lease, stops, and wakes up when the other one has saved the same step."""
    looked, go_on = threading.Event(), threading.Event()

    def before() -> None:
        looked.set()
        assert go_on.wait(60)

    old = saved(tmp_path, [5])
    old.save(10, {"weights": {"w": torch.zeros(50)}}, before)
    assert looked.wait(60)
    Lease.take(RunDir(tmp_path), is_own_process=False)
    saved(tmp_path, [10])
    go_on.set()
    with pytest.raises(RunError, match="cannot be written"):
        old.wait()
    assert checkpoint.newest(RunDir(tmp_path), IDENTITY) == (10, [])
    assert checkpoint.load(RunDir(tmp_path), 10)["weights"]["w"][0] == 10
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


class Bomb:
    """Runs code when unpickled."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("exploded"),)


def test_a_checkpoint_that_holds_code_does_not_run_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path, [5])
    torch.save({"weights": Bomb()}, tmp_path / "checkpoints" / "step-0000000005" / "state.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        checkpoint.load(RunDir(tmp_path), 5)
    assert not (tmp_path / "exploded").exists()


def test_a_full_disk_stops_the_run_and_keeps_earlier_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = saved(tmp_path, [5])

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    made.save(10, {"weights": {}}, lambda: None)
    with pytest.raises(RunError, match="No space left on device"):
        made.wait()
    assert checkpoint.newest(RunDir(tmp_path), IDENTITY) == (5, [])
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_checkpoints_after_damaged_ones_are_kept(tmp_path: Path) -> None:
    saved(tmp_path, [4, 8, 12], keep=3)
    for step in (8, 12):
        (tmp_path / "checkpoints" / f"step-{step:010}" / "state.pt").write_bytes(b"damaged")
    assert checkpoint.newest(RunDir(tmp_path), IDENTITY)[0] == 4
    saved(tmp_path, [5, 6, 7], keep=2)
    assert checkpoint.newest(RunDir(tmp_path), IDENTITY)[0] == 7


def test_a_state_that_cannot_be_read_back_is_reported_at_the_first_checkpoint(
    tmp_path: Path,
) -> None:
    made = saved(tmp_path, [])
    made.save(5, {"lr": np.float64(0.1)}, lambda: None)
    with pytest.raises(RunError, match="a checkpoint cannot be written"):
        made.wait()
    assert not list((tmp_path / "checkpoints").iterdir())


def test_any_failure_of_the_writer_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = saved(tmp_path, [5])

    def odd(*_: Any) -> None:
        raise RuntimeError("unexpected pos 64 vs 0")  # torch's words for a full disk

    monkeypatch.setattr(torch, "save", odd)
    made.save(10, {"weights": {}}, lambda: None)
    with pytest.raises(RunError, match="unexpected pos"):
        made.wait()
    assert checkpoint.newest(RunDir(tmp_path), IDENTITY)[0] == 5


@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", built_in("optimizers"))
def test_every_optimizer_resumes_with_the_same_bits(
    name: str, kind: torch.dtype, tmp_path: Path
) -> None:
    def made() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1)).to(kind)
        return model, registry.optimizers[name].build(list(model.parameters()))

    def stepped(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            optimizer.zero_grad()
            model(torch.randn(5, 3, dtype=kind)).square().mean().backward()
            optimizer.step()

    whole, optimizer = made()
    stepped(whole, optimizer, range(6))
    first, optimizer = made()
    stepped(first, optimizer, range(3))
    checkpoints = saved(tmp_path, [])
    state: Any = TrainState
    checkpoints.save(3, state(first, optimizer, None).snapshot(), lambda: None)
    checkpoints.wait()
    second, optimizer = made()
    state(second, optimizer, None).restore(checkpoint.load(RunDir(tmp_path), 3), 3)
    stepped(second, optimizer, range(3, 6))
    for one, other in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_full_disk_is_reported_with_bytes_needed_and_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's own words for it are a line of its C++ code."""
    from collections import namedtuple

    def refused(*_: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", refused)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**30, 2**30, 2**19))
    checkpoints = saved(tmp_path, [])
    checkpoints.save(3, {"weights": torch.zeros(2**18)}, lambda: None)
    expected = r"No space left on device: 1.0 MiB needed, 0.5 free"
    with pytest.raises(RunError, match=rf"cannot be written to {tmp_path}/checkpoints: {expected}"):
        checkpoints.wait()
