"""One process may write to a run's folder; its successor sees to that."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import RunError
from pipeline.files.atomic import temporary_path
from pipeline.rundir import RunDir
from pipeline.rundir.lease import Lease
from pipeline.rundir.records import Holder

pytestmark = pytest.mark.processes
HOLDER = """
import sys, time
from pathlib import Path
from pipeline.files.atomic import temporary_path
from pipeline.rundir import RunDir
from pipeline.rundir.lease import Lease
Lease.take(RunDir(Path(sys.argv[1])), is_own_process=sys.argv[2] == "own")
print("taken", flush=True)
time.sleep(60)
"""


def holder(folder: Path, kind: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, folder, kind], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "taken\n"
    return process


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_predecessor_that_does_nothing_else_is_killed(tmp_path: Path, is_stopped: bool) -> None:
    with holder(tmp_path, "own") as process:
        if is_stopped:
            process.send_signal(signal.SIGSTOP)
        Lease.take(RunDir(tmp_path), is_own_process=False)
        assert process.wait(1) == -signal.SIGKILL, "it is gone when the lease is taken"


def test_a_predecessor_that_may_do_other_things_lives_on_and_writes_nothing(tmp_path: Path) -> None:
    with holder(tmp_path, "shared") as process:
        Lease.take(RunDir(tmp_path), is_own_process=False)
        assert process.poll() is None
        process.kill()


def test_another_process_that_has_its_id_is_left_alone(tmp_path: Path) -> None:
    with holder(tmp_path, "own") as process:
        lease = Holder.read(RunDir(tmp_path).lease)
        lease.model_copy(update={"started": lease.started - 100}).write(RunDir(tmp_path).lease)
        Lease.take(RunDir(tmp_path), is_own_process=False)
        assert process.poll() is None
        process.kill()


def test_attempts_are_counted_and_only_the_last_may_write(tmp_path: Path) -> None:
    first, second = (Lease.take(RunDir(tmp_path), is_own_process=False) for _ in range(2))
    assert (first.holder.attempt, second.holder.attempt) == (1, 2)
    second.check()
    with pytest.raises(RunError, match=r"attempt 2 at this run, .* has taken over from attempt 1"):
        first.check()


def test_a_damaged_lease_does_not_keep_a_run_from_going_on(tmp_path: Path) -> None:
    RunDir(tmp_path).lease.write_text('{"attempt": 1, ')
    Lease.take(RunDir(tmp_path), is_own_process=False).check()


@pytest.mark.parametrize(
    "name",
    ["journal", "weights", "done", "held_out", "importance", "nonfinite"],
)
def test_what_a_predecessor_was_about_to_put_in_place_is_gone(name: str, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    temporary = temporary_path(getattr(run, name))
    temporary.write_text("of an attempt that is stopped")
    Lease.take(run, is_own_process=False)
    assert not temporary.exists()
