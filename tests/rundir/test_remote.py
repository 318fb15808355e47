"""A run in an object store: what each attempt takes from it, and leaves there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from pipeline.errors import RunError
from pipeline.files.store import FAULTS
from pipeline.rundir import RunDir, remote, remote_threads
from pipeline.rundir.checkpoint import Checkpoints
from pipeline.rundir.journal import Reader
from pipeline.rundir.layout import facts_of
from pipeline.rundir.lease import Lease
from pipeline.rundir.records import Done, Identity
from pipeline.rundir.remote import Remote, copies
from pipeline.rundir.remote_threads import StorageThread
from pipeline.spec import Checkpoint
from tests.rundir.test_pieces import append, line

IDENTITY = Identity(spec="a", data="b", bits={})


@dataclass
class Worker:
    """An attempt at the run, on a node of its own."""

    run: RunDir
    remote: Remote
    lease: Lease
    checkpoints: Checkpoints
    skipped: list[str]

    def train(self, *steps: int) -> None:
        """Add steps to the curve."""
        append(self.run.journal, *(line(step, time=self.lease.holder.attempt) for step in steps))

    def save(self, step: int) -> None:
        """Save a checkpoint, and put it there."""
        weights = {"w": torch.full((50,), float(step))}
        self.checkpoints.save(step, {"weights": weights}, lambda: None)
        self.checkpoints.wait()
        self.remote.backup.push(self.run.checkpoint(step), self.run.journal, 3)
        self.remote.push_curve(self.run.journal)


@pytest.fixture
def storage(tmp_path: Path) -> str:
    return f"file://{tmp_path / 'store'}"


def attempt(storage: str, folder: Path) -> Worker:
    there, run = Remote(storage, "x-1"), RunDir(folder / "x-1")
    there.receive(run)
    lease, skipped = there.take(run, is_own_process=False)
    run.journal.touch()
    run.checkpoints.mkdir(exist_ok=True)
    there.begin_curve(run.journal)
    return Worker(run, there, lease, Checkpoints(run, Checkpoint(), IDENTITY), skipped)


def steps(run: RunDir) -> list[tuple[int, int]]:
    """Each step of the curve, and the attempt that wrote it first."""
    return [(p["step"], p["time"]) for p in Reader(run.journal).new()]


def test_an_attempt_elsewhere_has_the_newest_state_and_all_of_the_curve(
    storage: str, tmp_path: Path
) -> None:
    first = attempt(storage, tmp_path / "one")
    first.train(1, 2)
    first.save(2)
    first.train(3, 4)
    first.remote.push_curve(first.run.journal)
    first.train(5)  # which the store never gets
    second = attempt(storage, tmp_path / "two")
    assert second.skipped == []
    assert second.run.saved_steps() == [2]
    assert steps(second.run) == [(1, 1), (2, 1), (3, 1), (4, 1)]
    assert second.lease.holder.attempt == 2
    second.train(5, 6)
    second.save(6)
    third = attempt(storage, tmp_path / "one")
    assert third.run.saved_steps() == [2, 6]
    assert steps(third.run) == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2)]
    assert [piece.name[-7] for piece in third.remote.backup.pieces.all] == ["1", "1", "2"]


def test_states_that_only_this_node_has_do_not_count(storage: str, tmp_path: Path) -> None:
    first = attempt(storage, tmp_path)
    first.train(1, 2)
    first.save(1)
    first.checkpoints.save(2, {}, lambda: None)
    first.checkpoints.wait()
    assert attempt(storage, tmp_path).run.saved_steps() == [1]


def test_a_curve_that_was_cut_is_put_there_anew(storage: str, tmp_path: Path) -> None:
    first = attempt(storage, tmp_path / "one")
    first.train(1, 2, 3)
    first.remote.push_curve(first.run.journal)
    second = Remote(storage, "x-1")
    run = RunDir(tmp_path / "two")
    second.receive(run)
    second.take(run, is_own_process=False)
    run.journal.write_bytes(run.journal.read_bytes()[: len(line(1))])  # as a repair does
    second.begin_curve(run.journal)
    append(run.journal, line(2, time=2))
    second.push_curve(run.journal)
    assert steps(attempt(storage, tmp_path / "three").run) == [(1, 1), (2, 2)]


def test_a_damaged_curve_ends_with_the_checkpoint(storage: str, tmp_path: Path) -> None:
    first = attempt(storage, tmp_path / "one")
    first.train(1)
    first.save(1)
    first.train(2)
    first.remote.push_curve(first.run.journal)
    first.remote.store.write(b"?", first.remote.backup.pieces.all[-1].name)
    assert steps(attempt(storage, tmp_path / "two").run) == [(1, 1)]


def test_the_commands_copy_has_the_curve_and_the_result(storage: str, tmp_path: Path) -> None:
    command, there = RunDir(tmp_path / "command"), Remote(storage, "x-1")
    command.imports.mkdir(parents=True)
    for path in (command.record, command.spec, command.imports / "mine.py"):
        path.write_text(path.name)
    there.send(command)
    worker = attempt(storage, tmp_path / "node")
    assert (worker.run.imports / "mine.py").read_text() == "mine.py"
    worker.train(1)
    worker.save(1)
    other = RunDir(tmp_path / "other")
    other.path.mkdir()
    there.fetch(other)
    assert other.spec.read_text() == "spec.yaml"
    assert steps(other) == [(1, 1)]
    assert other.saved_steps() == [1]
    assert not other.is_finished
    worker.run.weights.write_bytes(b"weights")
    files = {path.name: facts_of(path) for path in (worker.run.journal, worker.run.weights)}
    done = Done(
        steps=1, time=0, weights_sha256="", files=files, best=None, workers=[1],
        first_difference=None,
    )  # fmt: skip
    done.write(worker.run.done)
    worker.remote.backup.push_result(worker.run)
    there.fetch(other)
    assert other.is_intact
    attempt(storage, tmp_path / "again")  # as when its end was damaged
    there.fetch(other)
    assert not other.is_finished


def test_the_one_that_was_cut_off_writes_nothing_more(storage: str, tmp_path: Path) -> None:
    first = attempt(storage, tmp_path / "one")
    thread = StorageThread(first.run, first.checkpoints, first.remote, first.lease)
    attempt(storage, tmp_path / "two")
    first.train(1)
    thread.open()
    thread.close()
    with pytest.raises(RunError, match=r"attempt 2 at this run, by process .* has taken over"):
        thread.update()
    assert Remote(storage, "x-1").curve() == ()


def test_the_workers_hear_that_they_are_to_stop(storage: str, tmp_path: Path) -> None:
    worker = attempt(storage, tmp_path / "one")
    thread = StorageThread(worker.run, worker.checkpoints, worker.remote, worker.lease)
    worker.remote.store.write(b"", "stop")
    thread.open()
    thread.close()
    assert worker.run.stop.exists()


def test_a_result_that_cannot_be_put_there_ends_the_run(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = attempt(storage, tmp_path / "one")
    thread = StorageThread(worker.run, worker.checkpoints, worker.remote, worker.lease)
    monkeypatch.setattr(remote, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(RunError, match=f"storage: {storage}/x-1 cannot be used: "):
        thread.push_result()


def test_work_that_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_threads, "LOOK_SECONDS", 0.01)
    tries: list[int] = []

    def work() -> None:
        tries.append(1)
        if len(tries) < 3:
            raise FAULTS[0]("down")

    with remote_threads.Repeated(work) as repeated:
        while len(tries) < 3:
            pass
    assert not repeated.fault


def test_copies_of_a_storage_are_found_again_with_other_passwords(tmp_path: Path) -> None:
    one, other = (copies(tmp_path, f"s3://key:{secret}@b/x", "runs") for secret in ("a", "b"))
    assert one == other
    assert copies(tmp_path, "s3://b/x", "workers").name != one.name
    assert one.parent.name == ".runs"
