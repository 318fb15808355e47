"""Workers are killed, stopped, failed or doubled anywhere: the run ends with the same bits."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.rundir.journal import Reader
from tests.chaos import harness
from tests.chaos.disk import Disk
from tests.chaos.harness import Case

ALL = (pytest.mark.chaos, pytest.mark.timeout(3600))
ACTIONS = ("kill", "raise", "full", "broken", "stop")


def part(number: int, some: int) -> pytest.MarkDecorator:
    """All of the runs, or some in the ordinary suite."""
    return pytest.mark.parametrize(
        "runs", [pytest.param(number, marks=ALL, id="all"), pytest.param(some, id="some")]
    )


@part(100, 3)
def test_random_kills_change_no_bit(whole: Case, runs: int) -> None:
    """Three kills a run, of one worker or of all, at any step."""
    base, tree, reference = whole
    drawn = random.Random(runs)
    for run in range(runs):
        place = harness.fresh(base / "run")
        for _ in range(3):
            num = drawn.choice([3, 3, 4, 5])
            step = drawn.randrange(harness.STEPS)
            victims = range(num) if drawn.random() < 0.25 else [drawn.randrange(num)]
            harness.attempt(tree, place, num, None, [(rank, step) for rank in victims])
        harness.completed(tree, place)
        assert harness.left(place) == reference, f"run {run}"


@part(8, 2)
def test_the_comparison_can_see_what_plain_ddp_does(whole: Case, runs: int) -> None:
    base, _, _ = whole
    tree = harness.spec_of(base, microbatch_size=None, batch_size=15)
    tree["model"] |= {"dropout": 0.0, "hidden": [64, 64]}
    place = harness.fresh(base / "ddp")
    assert harness.attempt(tree, place, 3, by_ddp=True) == [0, 0, 0]
    undisturbed = harness.left(place)
    same = 0
    for run in range(runs):
        place = harness.fresh(base / "ddp")
        harness.attempt(tree, place, 3, None, [(1, 9 + run)], by_ddp=True)
        assert harness.attempt(tree, place, 3, by_ddp=True) == [0, 0, 0]
        same += harness.left(place)["weights"] == undisturbed["weights"]
    assert same == 0


@pytest.mark.parametrize("action", ACTIONS)
@part(32, 1)
def test_a_fault_at_a_file_operation_loses_nothing(whole: Case, action: str, runs: int) -> None:
    """Any operation of the first worker: journal, checkpoint, lease, weights."""
    base, tree, reference = whole
    disk = Disk(harness.fresh(base / "seen"))
    with disk.watching():
        harness.alone(tree, base / "seen")
    drawn = random.Random(action)
    for number in sorted(drawn.sample(range(len(disk.seen)), runs)):
        place = harness.fresh(base / "run")
        workers = harness.started(tree, place, 3, (0, number, action))
        codes = harness.ended(workers, seconds=5 if action == "stop" else 60)
        assert not all(code == 0 for code in codes) or harness.left(place) == reference
        harness.completed(tree, place)
        assert harness.left(place) == reference, f"{action} at {disk.seen[number]}"


@part(50, 2)
def test_a_stopped_attempt_that_wakes_up_writes_nothing(whole: Case, runs: int) -> None:
    """It is stopped, its successor trains, and it is woken up: on another machine, as it says."""
    base, tree, reference = whole
    disk = Disk(harness.fresh(base / "seen"))
    with disk.watching():
        harness.alone(tree, base / "seen")
    drawn = random.Random(0)
    for run in range(runs):
        place = harness.fresh(base / "run")
        stopped_at = drawn.randrange(20, len(disk.seen) - 12)
        old = harness.started(tree, place, 3, (0, stopped_at, "stop"))
        wait_for(lambda old=old: state_of(old[0].pid) in "TZX")
        elsewhere = run % 2 == 0
        if elsewhere:  # where the successor cannot kill it
            for name in ("lease.json", ".lease.json.copy"):
                relabel(place / name)
        harness.completed(tree, place)
        written = content(place)
        for worker in old:
            if worker.is_alive():
                os.kill(worker.pid, signal.SIGCONT)
        codes = harness.ended(old, seconds=25)
        assert all(codes), f"run {run}: the old attempt ended with {codes}"
        assert codes[0] == (1 if elsewhere else -signal.SIGKILL)
        now, about = content(place), f"stopped at {disk.seen[stopped_at]}"
        assert now == {name: written.get(name) for name in now}, about
        manifests = sorted(name for name in written if name.endswith("manifest.json"))
        for name in set(written) - set(now):  # it was about to delete an old checkpoint
            assert Path(name).parent in [Path(m).parent for m in manifests[:-2]], about
        assert harness.left(place) == reference


def relabel(path: Path) -> None:
    """The lease as another machine would have written it."""
    from pipeline.rundir.records import Holder

    if path.exists():
        Holder.read(path).model_copy(update={"host": "elsewhere"}).write(path)


def wait_for(is_true: Any, seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < until
        time.sleep(0.02)


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def content(folder: Path) -> dict[str, bytes]:
    """Everything but what the old attempt says of its own end."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "errors.txt" and "/.step-" not in str(path)
    }


def test_a_clock_that_jumps_changes_nothing(whole: Case) -> None:
    """A day ahead, then a day back: nothing is ordered by time."""
    base, tree, reference = whole
    place = harness.fresh(base / "run")
    for seconds, step in ((86_400, 9), (-86_400, 14), (0, 19)):
        harness.attempt({**tree, "clock": seconds}, place, 3, None, [(1, step)])
    harness.completed(tree, place)
    assert harness.left(place) == reference
    times = [p["time"] for p in Reader(place / "curve.jsonl").new() if "train" in p]
    assert max(times) - min(times) > 1.9 * 86_400_000, "the clock did jump"


def test_steps_that_are_left_out_are_the_same_on_any_workers(whole: Case) -> None:
    """A row whose loss is infinite: its steps are skipped, also when they are recomputed."""
    base, _, _ = whole
    tree = harness.spec_of(harness.fresh(base / "odd"), skip_nonfinite=20, best_by=None, stop=None)
    path = base / "odd" / "rows.parquet"
    table = pq.read_table(path)
    y = table["y"].to_numpy().copy()
    y[7] = 1e30
    pq.write_table(table.set_column(3, "y", pa.array(y)), path)
    tree["data"] |= {"validation": None, "test": None}
    tree |= {"schedule": "cosine"}
    tree["training"] |= {"threshold": None}
    harness.prepared(tree)
    assert harness.attempt(tree, harness.fresh(base / "whole-odd"), 3) == [0, 0, 0]
    reference = harness.left(base / "whole-odd")
    place = harness.fresh(base / "run")
    for num, step in ((4, 5), (3, 13), (5, 20)):
        harness.attempt(tree, place, num, None, [(num - 1, step)])
    harness.completed(tree, place)
    assert harness.left(place) == reference
    points = list(Reader(place / "curve.jsonl").new())
    assert len([p for p in points if "skipped" in p]) >= 5
