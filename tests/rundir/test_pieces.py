"""A journal in pieces: whatever its writers do, who follows reads each line once, in order."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.files.store import Store
from pipeline.rundir.journal import Reader, format_line
from pipeline.rundir.pieces import MOST_BYTES, Follower, Pieces, joined
from pipeline.rundir.records import StepPoint


def line(step: int, loss: float = 0.5, time: int = 0) -> bytes:
    point: StepPoint = {
        "step": step, "epoch": 0.1, "train": {"loss": loss}, "terms": {}, "time": time,
    }  # fmt: skip
    return format_line(point)


def append(path: Path, *lines: bytes) -> None:
    with path.open("ab") as file:
        file.writelines(lines)


def steps(path: Path) -> list[int]:
    return [point["step"] for point in Reader(path).new()]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.at(str(tmp_path / "store"), "storage")


def test_the_last_piece_grows_until_it_is_closed(store: Store, tmp_path: Path) -> None:
    journal, pieces = tmp_path / "curve.jsonl", Pieces(store)
    append(journal, line(1))
    pieces.push(journal, closes=False)
    pieces.push(journal, closes=False)
    append(journal, line(2), line(3)[:9])
    pieces.push(journal, closes=True)
    append(journal, line(3)[9:], line(4))
    pieces.push(journal, closes=False)
    size = 2 * len(line(1))
    assert [piece.name for piece in pieces.all] == [
        "curve-000000000000.jsonl", f"curve-{size:012}.jsonl",
    ]  # fmt: skip
    assert joined(store, pieces.all) == journal.read_bytes()


def test_a_piece_that_is_long_is_closed(store: Store, tmp_path: Path) -> None:
    journal, pieces = tmp_path / "curve.jsonl", Pieces(store)
    append(journal, *map(line, range(1 + MOST_BYTES // len(line(0)))))
    pieces.push(journal, closes=False)
    append(journal, line(10**6))
    pieces.push(journal, closes=False)
    assert len(pieces.all) == 2
    assert joined(store, pieces.all) == journal.read_bytes()


def test_who_follows_has_each_line_once_whatever_the_writers_do(
    store: Store, tmp_path: Path
) -> None:
    """A second attempt goes on from an earlier step; the first one, cut off, writes on."""
    first, second, here = (tmp_path / name for name in ("first", "second", "here"))
    old = Pieces(store, mark="-1")
    append(first, *(line(step, time=1) for step in range(1, 6)))
    old.push(first, closes=False)
    follower = Follower(store, here)
    follower.update(old.all)
    append(first, line(6, time=1))
    old.push(first, closes=False)
    follower.update(old.all)
    assert steps(here) == [1, 2, 3, 4, 5, 6]
    new = Pieces(store, Pieces(store, old.all).all, mark="-2")
    second.write_bytes(joined(store, old.all))
    append(first, line(7, time=1), line(8, time=1))
    old.push(first, closes=True)
    append(second, line(7, time=2))
    new.push(second, closes=False)
    follower.update(old.all)
    follower.update(new.all)
    append(second, *(line(step, time=2) for step in range(8, 11)))
    new.push(second, closes=True)
    follower.update(new.all)
    assert joined(store, new.all) == second.read_bytes()
    assert steps(here) == list(range(1, 11))


def test_a_damaged_piece_is_told_and_nothing_of_it_is_written(store: Store, tmp_path: Path) -> None:
    journal, here, pieces = tmp_path / "curve.jsonl", tmp_path / "here", Pieces(store)
    append(journal, line(1))
    pieces.push(journal, closes=True)
    store.write(b"{}\n" + line(1)[3:], pieces.all[0].name)
    with pytest.raises(ValueError, match="is damaged"):
        Follower(store, here).update(pieces.all)
    assert not here.read_bytes()
