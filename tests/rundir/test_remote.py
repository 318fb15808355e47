"""A run in an object store: what each attempt takes from it, and leaves there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from pipeline.errors import RunError
from pipeline.files.store import FAULTS, Store
from pipeline.rundir import RunDir, remote
from pipeline.rundir.checkpoint import Checkpoints
from pipeline.rundir.journal import Reader
from pipeline.rundir.layout import facts_of
from pipeline.rundir.lease import Lease
from pipeline.rundir.records import DataFacts, Done, Identity, Launcher, Record
from pipeline.rundir.remote import copies
from pipeline.rundir.remote_command import CommandSide
from pipeline.rundir.remote_worker import StorageThread, WorkerSide
from pipeline.spec import Checkpoint
from tests.rundir.test_pieces import append, line

IDENTITY = Identity(spec="a", data="b", bits={})


def record(launcher: str, identity: Identity = IDENTITY) -> Record:
    """What a command says of its run."""
    texts = ("name", "job", "experiment", "tracking_uri", "spec", "example", "token")
    more = ("imports_sha256", "primary_metric", "command")
    data = DataFacts(
        name="", fingerprint=identity.data, files=[], num_files=0, rows={}, digests={}, dropped=0,
        columns={}, profile={},
    )  # fmt: skip
    return Record(
        **dict.fromkeys((*texts, *more), ""), register_as=None, params={}, data=data, fields=[],
        tags={}, versions={}, modules=[], num_workers=1, num_steps=1, is_lower_better=True,
        launcher=Launcher(id=launcher, pid=1, host="there"), is_copied=True,
        digest=identity.spec,
    )  # fmt: skip


@dataclass
class Worker:
    """An attempt at the run, on a node of its own."""

    run: RunDir
    remote: WorkerSide
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
        self.remote.push_curve()


@pytest.fixture
def storage(tmp_path: Path) -> str:
    return f"file://{tmp_path / 'store'}"


def begin(storage: str, folder: Path, identity: Identity = IDENTITY) -> Worker:
    """An attempt whose curve nobody has looked at yet."""
    run = RunDir(folder / "x-1")
    there = WorkerSide(storage, run, command=RunDir(folder / "elsewhere" / "x-1"))
    if not there.store.has("record.json"):
        there.store.write(record("me").to_bytes(), "record.json")
    there.receive("me")
    lease, skipped = there.take(identity, is_own_process=False)
    return Worker(run, there, lease, Checkpoints(run, Checkpoint(), identity), skipped)


def attempt(storage: str, folder: Path, identity: Identity = IDENTITY) -> Worker:
    worker = begin(storage, folder, identity)
    run, there = worker.run, worker.remote
    run.journal.touch()
    run.checkpoints.mkdir(exist_ok=True)
    there.begin_curve()
    return worker


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
    first.remote.push_curve()
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
    names = [piece.name for piece in third.remote.backup.pieces.all]
    assert [name.split("-")[2] for name in names] == ["1", "1", "2"]


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
    first.remote.push_curve()
    begun = begin(storage, tmp_path / "two")
    second, run = begun.remote, begun.run
    run.journal.write_bytes(run.journal.read_bytes()[: len(line(1))])  # as a repair does
    second.begin_curve()
    append(run.journal, line(2, time=2))
    second.push_curve()
    assert steps(attempt(storage, tmp_path / "three").run) == [(1, 1), (2, 2)]


def test_a_damaged_curve_ends_with_the_checkpoint(storage: str, tmp_path: Path) -> None:
    first = attempt(storage, tmp_path / "one")
    first.train(1)
    first.save(1)
    first.train(2)
    first.remote.push_curve()
    first.remote.store.write(b"?", first.remote.backup.pieces.all[-1].name)
    assert steps(attempt(storage, tmp_path / "two").run) == [(1, 1)]


def test_the_commands_copy_has_the_curve_and_the_result(storage: str, tmp_path: Path) -> None:
    command = RunDir(tmp_path / "command" / "x-1")
    command.imports.mkdir(parents=True)
    record("me").write(command.record)
    for path in (command.spec, command.imports / "mine.py"):
        path.write_text(path.name)
    CommandSide(storage, command).send()
    worker = attempt(storage, tmp_path / "node")
    assert (worker.run.imports / "mine.py").read_text() == "mine.py"
    worker.train(1)
    worker.save(1)
    there = CommandSide(storage, RunDir(tmp_path / "other" / "x-1"))
    other = there.run
    other.path.mkdir(parents=True)
    there.fetch()
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
    there.fetch()
    assert other.is_intact
    there.send()  # as when its end is done again
    assert not other.is_finished
    there.fetch()
    assert not other.is_finished
    assert steps(other) == [(1, 1)]


def test_the_one_that_was_cut_off_writes_nothing_more(storage: str, tmp_path: Path) -> None:
    first = attempt(storage, tmp_path / "one")
    thread = StorageThread(first.remote, first.checkpoints, first.lease)
    attempt(storage, tmp_path / "two")
    first.train(1)
    thread.open()
    thread.close()
    with pytest.raises(RunError, match=r"attempt 2 at this run, by process .* has taken over"):
        thread.update()
    assert first.remote.curve("a", "b") == ()


def test_the_workers_hear_that_they_are_to_stop(storage: str, tmp_path: Path) -> None:
    worker = attempt(storage, tmp_path / "one")
    thread = StorageThread(worker.remote, worker.checkpoints, worker.lease)
    worker.remote.store.write(b"", "stop")
    thread.open()
    thread.close()
    assert worker.run.stop.exists()


def test_a_result_that_cannot_be_put_there_ends_the_run(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = attempt(storage, tmp_path / "one")
    thread = StorageThread(worker.remote, worker.checkpoints, worker.lease)
    monkeypatch.setattr(remote, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(RunError, match=f"storage: {storage}/x-1 cannot be used: "):
        thread.push_result()


def test_work_that_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "LOOK_SECONDS", 0.01)
    tries: list[int] = []

    def work() -> None:
        tries.append(1)
        if len(tries) < 3:
            raise FAULTS[0]("down")

    said: list[str] = []
    with remote.Repeated(work, said.append):
        while len(tries) < 3:
            pass
    assert said == ["down; it is tried again", "it is in use again"]


def test_copies_of_a_storage_are_found_again_with_other_passwords(tmp_path: Path) -> None:
    one, other = (copies(tmp_path, f"s3://key:{secret}@b/x", "runs") for secret in ("a", "b"))
    assert one == other
    assert copies(tmp_path, "s3://b/x", "workers").name != one.name
    assert one.parent.name == ".runs"


def test_what_another_job_has_put_there_is_left_alone(storage: str, tmp_path: Path) -> None:
    """Two commands have begun a run of one name at once; the later one's record is there."""
    first = attempt(storage, tmp_path / "one")
    first.train(1, 2)
    first.save(2)
    second = attempt(storage, tmp_path / "two", Identity(spec="other", data="b", bits={}))
    assert steps(second.run) == []
    assert second.run.saved_steps() == []
    assert second.skipped == ["step-0000000002 in the backup skipped: it belongs to another job"]
    second.train(1)
    second.remote.push_curve()
    assert steps(attempt(storage, tmp_path / "three", second.checkpoints.identity).run) == [(1, 2)]


def test_workers_of_a_command_that_was_superseded_do_not_begin(
    storage: str, tmp_path: Path
) -> None:
    there = attempt(storage, tmp_path / "one").remote
    there.store.write(record("other").to_bytes(), "record.json")
    with pytest.raises(RunError, match="process 1 on there has resumed this run"):
        there.receive("me")


@pytest.mark.parametrize("name", ["curve.json", "done.json", "lease.json"])
@pytest.mark.parametrize("content", [b"garbage", None])
def test_a_damaged_file_makes_no_run_unusable(
    name: str, content: bytes | None, storage: str, tmp_path: Path
) -> None:
    first = attempt(storage, tmp_path / "one")
    first.train(1)
    first.save(1)
    if content is None:
        first.remote.store.delete(name)
    else:
        first.remote.store.write(content, name)
    copy = RunDir(tmp_path / "copy" / "x-1")
    CommandSide(storage, copy).fetch()
    assert not copy.is_finished
    second = attempt(storage, tmp_path / "two")
    assert steps(second.run) == [(1, 1)]
    second.train(2)
    second.remote.push_curve()
    assert steps(attempt(storage, tmp_path / "three").run) == [
        (1, 1),
        (2, second.lease.holder.attempt),
    ]


def test_a_store_that_is_down_is_not_taken_for_one_that_is_damaged(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = attempt(storage, tmp_path / "one")
    first.train(1)
    first.save(1)

    def down(*_: object) -> bytes:
        raise OSError("no answer")

    monkeypatch.setattr(Store, "read", down)
    with pytest.raises(OSError, match="no answer"):
        first.remote.backup.pull_checkpoint(first.run, 0)


def test_a_copy_of_another_command_stops_nobody(storage: str, tmp_path: Path) -> None:
    """The workers may stand on a machine where the run was stopped some time ago."""
    worker = attempt(storage, tmp_path / "one")
    command = RunDir(tmp_path / "one" / "elsewhere" / "x-1")
    command.path.mkdir(parents=True)
    command.stop.touch()
    assert not worker.remote.is_to_stop(), "there is no record"
    record("other").write(command.record)
    assert not worker.remote.is_to_stop()
    record("me").write(command.record)
    assert worker.remote.is_to_stop(), "whether the store is there or not"


def test_what_earlier_attempts_wrote_is_added_to(storage: str, tmp_path: Path) -> None:
    first = attempt(storage, tmp_path / "one")
    first.run.system.mkdir()
    readings = first.run.system / "0.jsonl"
    readings.write_text("1\n")
    first.remote.put_outputs()
    second = attempt(storage, tmp_path / "two")
    with (second.run.system / "0.jsonl").open("a") as file:
        file.write("2\n")
    second.remote.put_outputs()
    assert second.remote.store.read("system/0.jsonl") == b"1\n2\n"


def test_the_commands_copy_takes_no_curve_of_another_job(storage: str, tmp_path: Path) -> None:
    first = attempt(storage, tmp_path / "one")
    first.train(1)
    first.remote.push_curve()
    there = CommandSide(storage, RunDir(tmp_path / "copy" / "x-1"))
    there.fetch()
    assert steps(there.run) == [(1, 1)]
    other = record("later", Identity(spec="other", data="b", bits={}))
    there.store.write(other.to_bytes(), "record.json")
    there.fetch()
    assert steps(there.run) == []


def test_a_superseded_command_says_nothing_of_mlflow(storage: str, tmp_path: Path) -> None:
    there = CommandSide(storage, RunDir(tmp_path / "copy" / "x-1"))
    there.run.path.mkdir(parents=True)
    record("me").write(there.run.record)
    there.run.recorded.write_text("mine")
    there.store.put(there.run.record, "record.json")
    there.keep_recorded()
    assert there.store.read("recorded.json") == b"mine"
    there.store.write(record("other").to_bytes(), "record.json")
    there.run.recorded.write_text("later")
    there.keep_recorded()
    assert there.store.read("recorded.json") == b"mine"


def test_the_state_that_a_run_goes_on_from_is_there_before_its_record(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = attempt(storage, tmp_path / "one")
    before.train(1)
    before.save(1)
    there = CommandSide(f"file://{tmp_path / 'other'}", RunDir(before.run.path))
    record("me").write(there.run.record)

    def down(*_: object) -> None:
        raise OSError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", down)
        with pytest.raises(OSError, match="no answer"):
            there.send()
    assert not there.store.has("record.json")
    there.send()
    assert there.store.has("step-0000000001/state.pt")
    assert there.store.has("record.json")


def test_a_copy_of_another_run_that_had_the_name_is_deleted(storage: str, tmp_path: Path) -> None:
    """Else MLflow would be told of one run what is of the other."""
    there = CommandSide(storage, RunDir(tmp_path / "copy" / "x-1"))
    there.run.path.mkdir(parents=True)
    record("me").model_copy(update={"token": "before"}).write(there.run.record)
    for path in (there.run.recorded, there.run.parent, there.run.initial):
        path.write_text("of another run")
    there.store.write(record("me").to_bytes(), "record.json")
    there.fetch()
    there.get_recorded()
    assert {path.name for path in there.run.path.iterdir()} == {"record.json", "curve.jsonl"}
