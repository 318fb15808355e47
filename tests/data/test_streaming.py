"""Rows that are fetched while training: the same ones at each step, however they are fetched."""

from __future__ import annotations

import fcntl
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.data import cache, spool
from pipeline.data.batch import Ragged
from pipeline.data.dataset import Dataset
from pipeline.data.sampler import WindowSampler, steps_per_epoch
from pipeline.data.streaming import Streamed
from pipeline.errors import DataError
from pipeline.spec import Cache
from pipeline.spec.data import Data
from tests import s3

RNG = np.random.default_rng(0)
NUM_ROWS = 1000


def table() -> pa.Table:
    return pa.table(
        {
            "x": RNG.normal(size=NUM_ROWS), "number": np.arange(NUM_ROWS, dtype=float),
            "kind": RNG.choice(["red", "blue", "green"], NUM_ROWS),
            "words": pa.array([["a", "b", "c"][: i % 4] for i in range(NUM_ROWS)]),
            "y": RNG.normal(size=NUM_ROWS),
        }
    )  # fmt: skip


TABLE = table()


def written(folder: Path, rows_per_file: int = 400, group: int = 100, kind: str = "parquet") -> Any:
    folder.mkdir()
    for start in range(0, NUM_ROWS, rows_per_file):
        part = TABLE.slice(start, rows_per_file)
        path = folder / f"{start:04}.{kind}"
        if kind == "parquet":
            pq.write_table(part, path, row_group_size=group)
        else:
            with pa.ipc.new_file(path, part.schema) as file:
                file.write_table(part, max_chunksize=group)
    return folder


def read(folder: Path, base: Path, **more: Any) -> cache.ConvertedRows:
    about: dict[str, Any] = {"stream": {"block_rows": 64, "window": 3}, "scale": "none"}
    data = Data(train=f"{folder.name}/*", target="y", **(about | more))
    return cache.load_or_convert(data, base, {}, np.float64, Cache(folder=str(base / "cache")))


def numbers(rows: Dataset, of: Any) -> list[float]:
    column = rows.gather(of)["number"]
    assert isinstance(column, Tensor)
    return [float(number) for number in column.tolist()]


def streamed(found: cache.ConvertedRows) -> Streamed:
    assert isinstance(found.train, Streamed)
    return found.train


sizes = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)


@given(sizes, st.integers(1, 13), st.integers(1, 5), st.sampled_from([None, 0, 7]))
def test_every_row_once_per_epoch_and_no_state(
    counts: list[int], batch_size: int, window: int, seed: int | None
) -> None:
    bounds = np.concatenate([[0], np.cumsum(counts)])
    order = WindowSampler(bounds, batch_size, seed, window)
    per_epoch = steps_per_epoch(order.num_rows, batch_size)
    steps = [order.rows(step) for step in range(2 * per_epoch)]
    for epoch in (0, 1):
        rows = np.concatenate(steps[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert sorted(rows) == list(range(order.num_rows))
    for step in reversed(range(2 * per_epoch)):
        alone = WindowSampler(bounds, batch_size, seed, window)
        assert (alone.rows(step) == steps[step]).all()
        blocks = set((np.searchsorted(bounds, steps[step], "right") - 1).tolist())
        assert blocks <= set(alone.blocks(step))
        following = set((np.searchsorted(bounds, alone.rows(step + 1)[:1], "right") - 1).tolist())
        assert following <= set(alone.blocks(step))


def test_blocks_are_drawn_and_mixed_anew_each_epoch() -> None:
    order = WindowSampler(np.arange(0, 1001, 10), 50, 0, 4)
    first, second = (np.concatenate([order.rows(e * 20 + s) for s in range(20)]) for e in (0, 1))
    assert (first != second).mean() > 0.9
    windows = [np.unique(first[start : start + 40] // 10) for start in range(0, 1000, 40)]
    assert all(len(blocks) == 4 for blocks in windows)
    assert np.abs(np.diff(first)).mean() > 100  # blocks come from anywhere


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("validation", [None, 0.2])
def test_streamed_rows_are_the_cached_ones(tmp_path: Path, kind: str, validation: Any) -> None:
    folder = written(tmp_path / "rows", kind=kind)
    whole = read(folder, tmp_path, stream=False, validation=validation)
    found = read(folder, tmp_path, validation=validation)
    for one, other in zip(found.fields, whole.fields, strict=True):  # sums are cut otherwise
        assert one.to_json() | {"center": 0.0} == other.to_json() | {"center": 0.0}
        assert one.center == pytest.approx(other.center, abs=1e-12)
    assert found.facts.rows == whole.facts.rows
    if validation:
        assert whole.validation is not None
        assert found.validation is not None
        assert (found.validation.records == whole.validation.records).all()
    rows = RNG.permutation(len(whole.train))
    with streamed(found).opened("run") as opened:
        for part in np.array_split(rows, 7):
            mine, theirs = opened.gather(part), whole.train.gather(part)
            for name in mine:
                have, want = mine[name], theirs[name]
                if isinstance(have, Ragged):
                    assert isinstance(want, Ragged)
                    assert (have.values == want.values).all()
                    assert (have.lengths == want.lengths).all()
                else:
                    assert isinstance(want, Tensor)
                    assert torch.equal(have, want)


@settings(deadline=None, max_examples=10)
@given(st.integers(30, 1000), st.integers(7, 300))
def test_any_row_groups_give_the_same_rows(
    tmp_path_factory: pytest.TempPathFactory, rows_per_file: int, group: int
) -> None:
    base = tmp_path_factory.mktemp("layout")
    one = read(written(base / "one"), base)
    other = read(written(base / "two", rows_per_file, group), base)
    assert one.fingerprint == other.fingerprint
    assert one.fields == other.fields
    rows = RNG.permutation(NUM_ROWS)[:50]
    with streamed(one).opened("one") as first, streamed(other).opened("two") as second:
        assert numbers(first, rows) == numbers(second, rows)


def test_what_is_on_the_disk_is_bounded_and_goes(tmp_path: Path) -> None:
    found = streamed(read(written(tmp_path / "rows"), tmp_path))
    order = WindowSampler(found.bounds, 50, 0, 3)
    seen = 0
    with found.opened("run") as opened:
        for step in range(40):
            opened.expect(order.blocks(step))
            opened.gather(order.rows(step))
            (folder,) = (tmp_path / "cache").glob(".*.blocks")
            blocks = [place for place in folder.iterdir() if place.name.isdigit()]
            assert len(blocks) <= 9
            seen = max(seen, len(blocks))
    assert seen >= 6
    assert not list((tmp_path / "cache").glob(".*.blocks"))


def test_blocks_of_the_dead_are_not_trusted(tmp_path: Path) -> None:
    found = streamed(read(written(tmp_path / "rows"), tmp_path))
    with found.opened("run") as opened:
        opened.gather(np.array([999]))
        (folder,) = (tmp_path / "cache").glob(".*.blocks")
        (torn,) = (place for place in folder.iterdir() if place.name.isdigit())
        kept = tmp_path / "kept"
        torn.rename(kept)
    folder.mkdir()
    (kept / "records.npy").write_bytes(b"")
    kept.rename(folder / torn.name)
    with found.opened("run") as opened:
        assert numbers(opened, np.array([999])) == [999]


@pytest.mark.parametrize("change", ["other values", "fewer rows", "gone", "other columns"])
def test_a_changed_file_is_noticed_at_once(tmp_path: Path, change: str) -> None:
    found = streamed(read(written(tmp_path / "rows"), tmp_path))
    path = tmp_path / "rows" / "0400.parquet"
    part = TABLE.slice(400, 400)
    if change == "gone":
        path.unlink()
    else:
        other = part.set_column(0, "x", pa.array(np.zeros(400)))
        other = {"fewer rows": part.slice(0, 7), "other columns": part.drop(["x"])}.get(
            change, other
        )
        pq.write_table(other, path, row_group_size=100)
    begun = time.monotonic()
    with found.opened("run") as opened, pytest.raises(DataError, match=r"0400.parquet was changed"):
        opened.gather(np.array([450]))
    assert time.monotonic() - begun < 5


def failing(found: Streamed, monkeypatch: pytest.MonkeyPatch, times: int) -> list[int]:
    """Let the first fetches fail; returns the blocks that were asked for."""
    tried: list[int] = []
    convert_to = found._fetcher.convert_to

    def fails(block: int, folder: Path, is_closed: threading.Event) -> None:
        tried.append(block)
        if len(tried) <= times:
            raise DataError("no route to host")
        convert_to(block, folder, is_closed)

    monkeypatch.setattr(found._fetcher, "convert_to", fails)
    return tried


def test_a_read_that_fails_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = streamed(read(written(tmp_path / "rows"), tmp_path))
    monkeypatch.setattr(spool, "FIRST_WAIT_SECONDS", 0.01)
    tried = failing(found, monkeypatch, 2)
    with found.opened("run") as opened:
        assert numbers(opened, np.array([999])) == [999]
    assert len(tried) == 3
    failing(found, monkeypatch, 1000)
    with found.opened("run") as opened, pytest.raises(DataError, match="no route to host"):
        opened.gather(np.array([999]))


def test_who_leaves_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for tries at a read that fails, nor for a worker that holds a block and hangs."""
    found = streamed(read(written(tmp_path / "rows"), tmp_path))
    failing(found, monkeypatch, 1000)
    with found.opened("run") as opened:
        opened.expect([5, 6])
        time.sleep(0.2)
        begun = time.monotonic()
    assert time.monotonic() - begun < 3
    with found.opened("run") as opened:
        (folder,) = [tmp_path / "cache" / f".{name.stem}.blocks" for name in
                     (tmp_path / "cache").glob("*-*.lock")]  # fmt: skip
        folder.mkdir(exist_ok=True)
        with (folder / "15.lock").open("a") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            threading.Timer(0.3, opened.interrupt).start()
            with pytest.raises(spool.StreamClosedError):
                opened.gather(np.array([999]))


def test_a_cache_that_is_deleted_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    found = streamed(read(written(tmp_path / "rows"), tmp_path))
    with found.opened("run") as opened:
        opened.gather(np.array([450]))
        shutil.rmtree(tmp_path / "cache")
        with pytest.raises(DataError, match="was deleted while rows were read"):
            opened.gather(np.array([999]))


def test_blocks_in_use_stay_when_the_cache_is_cleared_and_those_of_the_dead_go(
    tmp_path: Path,
) -> None:
    place = tmp_path / "cache"
    found = streamed(read(written(tmp_path / "rows"), tmp_path))
    orphan = place / ".0123-abcd.blocks"
    orphan.mkdir()
    with found.opened("run") as opened:
        opened.gather(np.array([450]))
        (folder,) = set(place.glob(".*.blocks")) - {orphan}
        before = sorted(folder.iterdir())
        cache.clear(place)
        assert sorted(folder.iterdir()) == before
        assert not orphan.exists()
        assert numbers(opened, np.array([999, 450])) == [999, 450]
    assert not list(place.glob("*-*.lock"))


def test_no_lock_is_left(tmp_path: Path) -> None:
    found = streamed(read(written(tmp_path / "rows"), tmp_path))
    with found.opened("run") as opened:
        opened.gather(np.array([450]))
    assert not list((tmp_path / "cache").glob("*-*.lock"))
    cache.clear(tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").glob("*.lock")] == ["spool.lock"]


def odd_columns() -> dict[str, Any]:
    """Columns that Arrow, or numpy, has trouble with."""
    fixed, count = pa.list_(pa.float64(), 2), range(60)
    return {
        "nested": pa.array([[[1.0, i], [2.0, 3.0]] for i in count], pa.list_(fixed, 2)),
        "fixed": pa.array([[i, 2.0] if i % 5 else None for i in count], fixed),
        "gaps": pa.array([None if 20 <= i < 40 else [i, 2.0] for i in count], fixed),
        "view": pa.array([f"w{i % 7}" if i % 11 else None for i in count], pa.string_view()),
        "half": pa.array(np.arange(60, dtype=np.float16)),
        "flag": pa.array([None if i % 13 == 0 else i % 2 == 0 for i in count]),
    }


@pytest.mark.parametrize("name", list(odd_columns()))
@pytest.mark.parametrize("validation", [None, 0.3])
def test_odd_columns(tmp_path: Path, name: str, validation: Any) -> None:
    table = pa.table({"v": odd_columns()[name], "number": pa.array(range(60)), "y": [0.0] * 60})
    (tmp_path / "rows").mkdir()
    with pa.ipc.new_file(tmp_path / "rows" / "0.arrow", table.schema) as file:
        file.write_table(table.slice(0, 0))
        file.write_table(table, max_chunksize=60)
    more: dict[str, Any] = {"missing": "drop", "validation": validation}
    whole = read(tmp_path / "rows", tmp_path, stream=False, **more)
    found = read(tmp_path / "rows", tmp_path, stream={"block_rows": 17, "window": 2}, **more)
    kept = {} if name in ("view", "flag") else {
        float(number): value for number, value in zip(
            table["number"].to_pylist(), table["v"].to_pylist(), strict=True) if value is not None
    }  # fmt: skip
    assert found.facts.rows == whole.facts.rows
    rows = np.arange(len(whole.train))
    with streamed(found).opened("run") as opened:
        mine, theirs = opened.gather(rows), whole.train.gather(rows)
        for column in mine:
            one, other = mine[column], theirs[column]
            assert isinstance(one, Tensor)
            assert isinstance(other, Tensor)
            assert torch.equal(one, other)
        if kept:
            values, order = mine["v"], mine["number"]
            assert isinstance(values, Tensor)
            assert isinstance(order, Tensor)
            assert values.tolist() == [kept[number] for number in order.tolist()]


def test_empty_row_groups_and_files(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    with pq.ParquetWriter(tmp_path / "rows" / "0.parquet", TABLE.schema) as file:
        for part in (TABLE.slice(0, 0), TABLE.slice(0, 600), TABLE.slice(0, 0)):
            file.write_table(part)
    pq.write_table(TABLE.slice(0, 0), tmp_path / "rows" / "1.parquet")
    pq.write_table(TABLE.slice(600), tmp_path / "rows" / "2.parquet", row_group_size=7)
    found = streamed(read(tmp_path / "rows", tmp_path))
    rows = RNG.permutation(NUM_ROWS)
    with found.opened("run") as opened:
        assert numbers(opened, rows) == rows.tolist()


@pytest.mark.parametrize(
    "validation",
    [{"group": "kind", "fraction": 0.3}, {"time": "number", "fraction": 0.1}],
)
def test_splits_by_a_column(tmp_path: Path, validation: Any) -> None:
    folder = written(tmp_path / "rows")
    inputs = ["x", "number", "words"]
    whole = read(folder, tmp_path, stream=False, validation=validation, inputs=inputs)
    found = read(folder, tmp_path, validation=validation, inputs=inputs)
    assert found.facts.rows == whole.facts.rows
    rows = np.arange(len(whole.train))
    with streamed(found).opened("run") as opened:
        assert numbers(opened, rows) == numbers(whole.train, rows)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3.Server]:
    with s3.running(tmp_path_factory.mktemp("s3")) as found:
        yield found


@pytest.mark.parametrize("is_streamed", [False, True])
def test_from_an_object_store(tmp_path: Path, server: s3.Server, is_streamed: bool) -> None:
    place = f"rows/{is_streamed}/"
    for number in range(0, NUM_ROWS, 250):
        part = TABLE.slice(number, 250)
        pq.write_table(part, f"{place}{number:04}.parquet", filesystem=server.filesystem)
    about: Any = {"stream": {"block_rows": 64, "window": 3}} if is_streamed else {}
    data = Data(train=server.uri(place), target="y", scale="none", **about)
    where = Cache(folder=str(tmp_path / "cache"))
    found = cache.load_or_convert(data, tmp_path, {}, np.float64, where)
    with found.train.opened("run") as opened:
        for rows in np.array_split(RNG.permutation(NUM_ROWS), 20):
            assert numbers(opened, rows) == rows.tolist()
    for path in (tmp_path / "cache").rglob("*"):
        assert path.is_dir() or s3.SECRET.encode() not in path.read_bytes()
