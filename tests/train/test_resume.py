"""Workers are killed, and a run goes on with another number of them: the same bits as undisturbed.

Real gloo processes and real SIGKILLs, three workers or more: two cannot show an order of sums.
"""

from __future__ import annotations

import json
import random
import shutil
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.multiprocessing.spawn import ProcessException

from pipeline import registry
from pipeline.distributed import ordered
from pipeline.errors import RunError, UsageError
from pipeline.specfile import load
from pipeline.train import checkpoint, determinism, faults, files
from pipeline.train.curve import Journal, Reader, curve_sha256, read, repair
from pipeline.train.job import prepared
from pipeline.train.lease import Lease
from pipeline.train.loop import train
from pipeline.train.state import TrainState
from tests.conftest import built_in
from tests.processes import on_workers
from tests.train.test_same_bits import transformer

STEPS = 40


def spec_of(data: Path, microbatch_size: int | None) -> dict[str, Any]:
    return transformer(data) | {
        "training": {"batch_size": 13, "microbatch_size": microbatch_size, "epochs": 10},
        "optimizer": {"name": "adamw", "lr": 1e-3}, "schedule": "cosine",
        "checkpoint": {"every_steps": 5, "keep": 2},
    }  # fmt: skip


def worked(
    tree: dict[str, Any], folder: Path, kills: Any, by_ddp: bool, rank: int, num: int
) -> None:
    job = prepared(load(tree), folder)
    if by_ddp:
        ordered.SMALL = 0
    train(job, folder, faults.planned(kills, folder, rank), STEPS)


def trained(
    tree: dict[str, Any],
    folder: Path,
    attempts: Sequence[tuple[int, list[tuple[int, int]]]],
    by_ddp: bool = False,
) -> dict[str, Any]:
    """What the run left after attempts of (number of workers, ranks and steps of kills)."""
    folder.mkdir()
    for num, kills in attempts:
        try:
            on_workers(num, partial(worked, tree, folder, kills, by_ddp))
        except ProcessException:
            assert kills, "an attempt without a kill failed"
    points = list(Reader(folder / "curve.jsonl").new())
    done = json.loads((folder / "done.json").read_text())
    return {
        "curve": curve_sha256(points),
        "weights": done["weights_sha256"],
        "validation": [(p["step"], p["validation"]) for p in points if "validation" in p],
        "steps": [p["step"] for p in points if "train" in p],
        "first_difference": done["first_difference"],
        "starts": [(p["step"], p["workers"]) for p in points if p.get("event") == "start"],
    }


SAME = ("curve", "weights", "validation", "steps", "first_difference")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


@pytest.fixture(scope="module")
def undisturbed(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = trained(spec_of(rows, 2), tmp_path_factory.mktemp("alone") / "run", [(1, [])])
    assert found["steps"] == list(range(1, STEPS + 1))
    return found


def test_kills_and_other_numbers_of_workers_change_no_bit(
    rows: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    attempts = [(3, [(1, 13)]), (2, [(0, 24)]), (5, [(4, 31), (2, 31)]), (4, [])]
    found = trained(spec_of(rows, 2), tmp_path / "run", attempts)
    assert {key: found[key] for key in SAME} == {key: undisturbed[key] for key in SAME}
    assert [workers for _, workers in found["starts"]] == [3, 2, 5, 4]
    assert all(step > 0 for step, _ in found["starts"][1:]), "each went on from a checkpoint"


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.chaos)])
def test_random_kills_change_no_bit(
    rows: Path, undisturbed: dict[str, Any], tmp_path: Path, seed: int
) -> None:
    drawn = random.Random(seed)
    steps = sorted(drawn.sample(range(STEPS), 3))
    attempts = [
        (num := drawn.randint(3, 5), [(drawn.randrange(num), step)]) for step in steps
    ]  # fmt: skip
    found = trained(spec_of(rows, 2), tmp_path / "run", [*attempts, (3, [])])
    assert {key: found[key] for key in SAME} == {key: undisturbed[key] for key in SAME}


@pytest.mark.parametrize("by_ddp", [True, False])
def test_the_comparison_can_see_what_plain_ddp_does_to_a_resumed_run(
    by_ddp: bool, rows: Path, tmp_path: Path
) -> None:
    """Without micro-batches, a small model's gradient is not left to DDP."""
    tree = spec_of(rows, None)
    tree["model"] |= {"dropout": 0.0}
    whole = trained(tree, tmp_path / "whole", [(3, [])], by_ddp)
    killed = trained(tree, tmp_path / "killed", [(3, [(1, 23)]), (3, [])], by_ddp)
    assert whole["steps"] == killed["steps"]
    assert (whole["weights"] != killed["weights"]) == by_ddp


def saved(folder: Path, steps: Sequence[int] = (5, 10), keep: int = 3) -> checkpoint.Checkpoints:
    """A run's folder with checkpoints of a small state."""
    from pipeline.spec import Checkpoint

    made = checkpoint.Checkpoints(folder, Checkpoint(keep=keep), IDENTITY)
    for step in steps:
        made.save(step, {"weights": {"w": torch.full((50,), float(step))}}, lambda: None)
    made.wait()
    return made


IDENTITY = {"spec": "a", "data": "b", "bits": {}}


def test_the_newest_checkpoint_is_taken_and_old_ones_go(tmp_path: Path) -> None:
    saved(tmp_path, range(5, 30, 5), keep=2)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-0000000020", "step-0000000025"]
    assert checkpoint.newest(tmp_path, IDENTITY) == (25, [])
    assert checkpoint.load(tmp_path, 25)["weights"]["w"][0] == 25


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
        step, passed = checkpoint.newest(tmp_path, IDENTITY)
        if file == "manifest.json" and step == 10 and not whole[place : place + 1].strip():
            continue  # other white space says the same
        assert step == 5
        assert "passed over" in passed[0]
    for end in drawn.sample(range(len(whole)), 50):
        path.write_bytes(whole[:end])
        assert checkpoint.newest(tmp_path, IDENTITY)[0] == 5


def test_a_checkpoint_of_another_job_is_passed_over(tmp_path: Path) -> None:
    saved(tmp_path)
    step, passed = checkpoint.newest(tmp_path, IDENTITY | {"spec": "other"})
    assert step == 0
    assert "another spec" in passed[0]


def test_what_a_killed_writer_left_behind_is_removed(tmp_path: Path) -> None:
    aside = files.beside(tmp_path / "checkpoints" / "step-0000000005")
    aside.mkdir(parents=True)
    (aside / "state.pt").write_bytes(b"half")
    Lease(tmp_path, is_own_process=False)
    saved(tmp_path, [10])
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-0000000010"]


def test_an_attempt_that_was_replaced_while_it_saves_leaves_its_successors_checkpoint(
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
    Lease(tmp_path, is_own_process=False)
    saved(tmp_path, [10])
    go_on.set()
    with pytest.raises(RunError, match="cannot be written"):
        old.wait()
    assert checkpoint.newest(tmp_path, IDENTITY) == (10, [])
    assert checkpoint.load(tmp_path, 10)["weights"]["w"][0] == 10
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
        checkpoint.load(tmp_path, 5)
    assert not (tmp_path / "exploded").exists()


def test_a_disk_that_is_full_stops_the_run_and_keeps_what_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = saved(tmp_path, [5])

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    made.save(10, {"weights": {}}, lambda: None)
    with pytest.raises(RunError, match="No space left on device"):
        made.wait()
    assert checkpoint.newest(tmp_path, IDENTITY) == (5, [])
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_torn_line_is_cut_and_known_points_are_not_written_twice(tmp_path: Path) -> None:
    path = tmp_path / "curve.jsonl"
    journal = Journal(path)
    for step in (1, 2, 3):
        journal.write(point(step, 0.5 / step))
    journal.close()
    with path.open("ab") as file:
        file.write(b'{"step": 4, "tr')
    before = list(Reader(path).new())
    assert repair(path) == (3, "")
    again = Journal(path, 1)
    for step in (2, 3, 4):
        again.write(point(step, 0.5 / step))
    again.close()
    after = list(Reader(path).new())
    assert after[:3] == before[:3]
    assert [p["step"] for p in after if "train" in p] == [1, 2, 3, 4]
    (said,) = [p for p in after if "event" in p]
    assert (said["step"], said["num_steps"], said["differs"]) == (3, 2, None)
    assert again.first_difference is None


def evaluated(step: int) -> bool:
    return step % 2 == 0


def whole_journal(path: Path, steps: int = 6) -> list[bytes]:
    """Lines of a journal with an evaluation every two steps."""
    path.unlink(missing_ok=True)
    journal = Journal(path)
    journal.event(0, "start", workers=3, bits={})
    for step in range(steps + 1):
        if step:
            journal.write(point(step, 1 / step))
        if evaluated(step):
            journal.write({"step": step, "epoch": 0.1, "validation": {"loss": 1.0}})
    journal.close()
    return path.read_bytes().splitlines(keepends=True)


def test_a_journal_is_whole_up_to_its_first_gap(tmp_path: Path) -> None:
    path = tmp_path / "curve.jsonl"
    lines = whole_journal(path)
    assert repair(path, evaluated) == (6, "")
    journal = Journal(path, 4)
    journal.event(4, "start", workers=3, bits={})  # of an attempt that was killed at once
    journal.close()
    assert repair(path, evaluated) == (6, ""), "what was done before counts"
    steps = [curve_line["step"] for curve_line in map(read, lines)]
    for number, step in enumerate(steps[1:], start=1):
        path.write_bytes(b"".join(lines[:number] + lines[number + 1 :]))
        found, said = repair(path, evaluated)
        assert found == step - 1, f"line {number} is lost"
        assert bool(said) == (number < len(lines) - 1)


def test_an_attempt_that_was_replaced_cannot_touch_the_journal(tmp_path: Path) -> None:
    """It wakes up before it has opened it, or after."""
    path = tmp_path / "curve.jsonl"
    old = Lease(tmp_path, is_own_process=False)
    asleep = Journal(path)
    asleep.write(point(1, 0.5))
    new = Lease(tmp_path, is_own_process=False)
    whole_journal(path)
    written = path.read_bytes()
    with pytest.raises(RunError, match="has taken over"):
        repair(path, evaluated, old.check)
    with pytest.raises(RunError, match="was replaced"):
        asleep.flush()
    new.check()
    (tmp_path / files.LEASE).unlink()
    Lease(tmp_path, is_own_process=False)
    with pytest.raises(RunError, match="has taken over"):
        new.check()
    assert path.read_bytes() == written


def test_a_finished_run_whose_curve_was_cut_is_not_finished(rows: Path, tmp_path: Path) -> None:
    tree = spec_of(rows, 2)
    whole = trained(tree, tmp_path / "run", [(1, [])])
    path = tmp_path / "run" / "curve.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: len(lines) // 2]))
    assert not files.is_done(tmp_path / "run")
    on_workers(1, partial(worked, tree, tmp_path / "run", [], False))
    points = list(Reader(path).new())
    assert curve_sha256(points) == whole["curve"]
    found = [(p["step"], p["validation"]) for p in points if "validation" in p]
    assert found == whole["validation"]


def test_a_step_that_gives_other_numbers_the_second_time_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "curve.jsonl"
    journal = Journal(path)
    journal.write(point(1, 0.5))
    journal.write(point(2, 0.25))
    journal.close()
    again = Journal(path, 0)
    again.write(point(1, 0.5))
    again.write(point(2, 0.2500001))
    again.close()
    assert again.first_difference == 2


def point(step: int, loss: float) -> dict[str, Any]:
    return {"step": step, "epoch": 0.1, "terms": {"mse": loss},
            "train": {"loss": loss, "rows_per_second": step * 1.5}}  # fmt: skip


def test_checkpoints_after_damaged_ones_are_kept(tmp_path: Path) -> None:
    saved(tmp_path, [4, 8, 12], keep=3)
    for step in (8, 12):
        (tmp_path / "checkpoints" / f"step-{step:010}" / "state.pt").write_bytes(b"damaged")
    assert checkpoint.newest(tmp_path, IDENTITY)[0] == 4
    saved(tmp_path, [5, 6, 7], keep=2)
    assert checkpoint.newest(tmp_path, IDENTITY)[0] == 7


def test_a_state_that_cannot_be_read_back_is_said_at_the_first_checkpoint(tmp_path: Path) -> None:
    made = saved(tmp_path, [])
    made.save(5, {"lr": np.float64(0.1)}, lambda: None)
    with pytest.raises(RunError, match="a checkpoint cannot be written"):
        made.wait()
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_writer_that_fails_in_any_way_is_heard_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = saved(tmp_path, [5])

    def odd(*_: Any) -> None:
        raise RuntimeError("unexpected pos 64 vs 0")  # torch's words for a full disk

    monkeypatch.setattr(torch, "save", odd)
    made.save(10, {"weights": {}}, lambda: None)
    with pytest.raises(RunError, match="unexpected pos"):
        made.wait()
    assert checkpoint.newest(tmp_path, IDENTITY)[0] == 5


@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", built_in("optimizers"))
def test_every_optimizer_goes_on_with_the_same_bits(
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
    state(second, optimizer, None).restore(checkpoint.load(tmp_path, 3), 3)
    stepped(second, optimizer, range(3, 6))
    for one, other in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other)


def test_streamed_rows_change_no_bit_either(rows: Path, tmp_path: Path) -> None:
    """Blocks come in other workers' time, and from files that are cut otherwise."""
    tree = spec_of(rows, 2)
    tree["data"] |= {"stream": {"block_rows": 11, "window": 2}}
    whole = trained(tree, tmp_path / "whole", [(1, [])])
    assert whole["steps"] == list(range(1, STEPS + 1))
    table = pq.read_table(tree["data"]["train"])
    (tmp_path / "parts").mkdir()
    for start in range(0, len(table), 17):
        pq.write_table(
            table.slice(start, 17), tmp_path / "parts" / f"{start:03}.parquet", row_group_size=5
        )
    tree["data"] |= {"train": str(tmp_path / "parts")}
    found = trained(tree, tmp_path / "run", [(3, [(1, 13)]), (5, [(4, 31), (2, 31)]), (4, [])])
    assert {key: found[key] for key in SAME} == {key: whole[key] for key in SAME}


def test_other_software_than_at_the_start_is_said(
    rows: Path, undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bits are not promised, so a run that goes on elsewhere says from where on."""
    job, folder = prepared(load(spec_of(rows, 2)), tmp_path), tmp_path / "run"
    folder.mkdir()
    train(job, folder, num_steps=20)
    shutil.rmtree(folder / "checkpoints" / "step-0000000020")
    (folder / "done.json").unlink()
    real = determinism.fingerprint
    monkeypatch.setattr(determinism, "fingerprint", lambda spec: real(spec) | {"torch": "2.99"})
    train(job, folder, num_steps=STEPS)
    said = [p for p in Reader(folder / "curve.jsonl").new() if p.get("event") == "bits"]
    (text,) = [p["text"] for p in said]
    assert said[0]["step"] == 15
    assert text.startswith(f"torch {torch.__version__} -> 2.99: after step 15 ")


def started_apart(tree: dict[str, Any], folder: Path, rank: int, num: int) -> str:
    """What a worker says whose model draws from elsewhere."""

    @registry.models.register("t_numpy_start")
    class Numpy(torch.nn.Module):
        """Weights that no seed of torch reaches."""

        def __init__(self, inputs: Any, outputs: Any) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.from_numpy(np.random.default_rng().random(1)))

        def forward(self, batch: Any) -> Any:
            return batch["a"] * self.weight.float()

    try:
        train(prepared(load(tree), folder), folder, num_steps=1)
    except UsageError as error:
        return str(error)
    return ""


def test_weights_that_start_differently_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1.0, 2.0, 3.0], "y": [1.0, 2.0, 3.0]}), tmp_path / "a.parquet")
    tree = {
        "name": "t", "loss": "mse", "model": "t_numpy_start",
        "data": {"train": str(tmp_path / "a.parquet"), "target": "y"},
    }  # fmt: skip
    said = on_workers(3, partial(started_apart, tree, tmp_path))
    assert all("start differently on each worker" in text for text in said)


def test_a_full_disk_is_said_with_what_is_needed_and_free(
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
