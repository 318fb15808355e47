"""Every state of the disk that a power cut can leave is one that a run resumes from.

The file operations of an undisturbed run are remembered: journal, checkpoints, lease, weights. What
each prefix of them would leave on a disk is laid out, with everything, or only what was flushed, or
with last writes torn; the run resumes from there, and ends as three workers undisturbed do.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.rundir.records import Recorded
from tests.chaos import harness
from tests.chaos.disk import Disk, Loss, laid_out
from tests.chaos.harness import Case

LOSSES: tuple[Loss, ...] = ("clean", "dropped", "torn")
ALL = (pytest.mark.chaos, pytest.mark.timeout(3600))
SOME = [pytest.param(1, marks=ALL, id="all"), pytest.param(11, id="some")]


@pytest.mark.parametrize("every", SOME)
def test_every_state_of_the_disk_is_resumed_from(whole: Case, every: int) -> None:
    base, tree, reference = whole
    disk = Disk(harness.fresh(base / "seen"))
    with disk.watching():
        harness.alone(tree, base / "seen")
    assert harness.left(base / "seen") == reference
    states = [(end, loss) for end in range(len(disk.seen) + 1) for loss in LOSSES]
    assert len(states) >= 300
    for end, loss in states[::every]:
        place = harness.fresh(base / "disk")
        laid_out(disk.seen[:end], place, loss)
        harness.alone(tree, place)
        assert harness.left(place) == reference, f"after {end} operations, {loss}"
        assert not list(place.glob("checkpoints/.step-*"))


def test_every_crash_state_of_a_record_is_one_that_was_written(tmp_path: Path) -> None:
    """The upload's high-water mark, and all that is written like it."""
    disk = Disk(tmp_path / "seen")
    (tmp_path / "seen").mkdir()
    marks = [Recorded(uploaded={"train": n}) for n in range(6)]
    with disk.watching():
        for mark in marks:
            mark.write(tmp_path / "seen" / "recorded.json")
    num_states = 0
    for end in range(len(disk.seen) + 1):
        done = sum(operation.kind == "folder" for operation in disk.seen[:end])
        for loss in LOSSES:
            place = harness.fresh(tmp_path / "disk")
            laid_out(disk.seen[:end], place, loss)
            num_states += 1
            if not done and not (place / "recorded.json").exists():
                continue
            assert Recorded.read(place / "recorded.json") in marks[max(0, done - 1) : done + 1]
    assert num_states > 75


def test_the_comparison_can_see_a_mark_that_is_written_in_place(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "seen")
    (tmp_path / "seen").mkdir()
    with disk.watching():
        for number in range(3):
            (tmp_path / "seen" / "mark.json").write_text(f'{{"uploaded": {number}}}')
    broken = 0
    for end in range(1, len(disk.seen) + 1):
        place = harness.fresh(tmp_path / "disk")
        laid_out(disk.seen[:end], place, "torn")
        broken += not (place / "mark.json").read_text().endswith("}")
    assert broken
