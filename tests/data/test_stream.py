"""Rows that are fetched while training: the same ones at each step, however they are fetched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
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

from pipeline.data import cache, stream
from pipeline.data.batch import Ragged
from pipeline.data.order import WindowOrder, steps_per_epoch
from pipeline.data.store import Store
from pipeline.data.stream import Streamed
from pipeline.dataspec import Data
from pipeline.errors import DataError
from pipeline.spec import Cache
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


def read(folder: Path, base: Path, **more: Any) -> cache.Converted:
    about: dict[str, Any] = {"stream": {"block_rows": 64, "window": 3}, "scale": "none"}
    data = Data(train=f"{folder.name}/*", target="y", **(about | more))
    return cache.rows(data, base, {}, np.float64, Cache(folder=str(base / "cache")))


def numbers(rows: Store, of: Any) -> list[float]:
    column = rows.gather(of)["number"]
    assert isinstance(column, Tensor)
    return [float(number) for number in column.tolist()]


def streamed(found: cache.Converted) -> Streamed:
    assert isinstance(found.train, Streamed)
    return found.train


sizes = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)


@given(sizes, st.integers(1, 13), st.integers(1, 5), st.sampled_from([None, 0, 7]))
def test_every_row_once_per_epoch_and_no_state(
    counts: list[int], batch_size: int, window: int, seed: int | None
) -> None:
    bounds = np.concatenate([[0], np.cumsum(counts)])
    order = WindowOrder(bounds, batch_size, seed, window)
    per_epoch = steps_per_epoch(order.num_rows, batch_size)
    steps = [order.rows(step) for step in range(2 * per_epoch)]
    for epoch in (0, 1):
        rows = np.concatenate(steps[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert sorted(rows) == list(range(order.num_rows))
    for step in reversed(range(2 * per_epoch)):
        alone = WindowOrder(bounds, batch_size, seed, window)
        assert (alone.rows(step) == steps[step]).all()
        blocks = set((np.searchsorted(bounds, steps[step], "right") - 1).tolist())
        assert blocks <= set(alone.blocks(step))
        following = set((np.searchsorted(bounds, alone.rows(step + 1)[:1], "right") - 1).tolist())
        assert following <= set(alone.blocks(step))


def test_blocks_are_drawn_and_mixed_anew_each_epoch() -> None:
    order = WindowOrder(np.arange(0, 1001, 10), 50, 0, 4)
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
        assert replace(one, center=0.0) == replace(other, center=0.0)
        assert one.center == pytest.approx(other.center, abs=1e-12)
    assert found.facts["rows"] == whole.facts["rows"]
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
def test_files_cut_otherwise_give_the_same_rows(
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
    order = WindowOrder(found.bounds, 50, 0, 3)
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


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    found = streamed(read(written(tmp_path / "rows"), tmp_path))
    other = TABLE.slice(400, 400).set_column(0, "x", pa.array(np.zeros(400)))
    pq.write_table(other, tmp_path / "rows" / "0400.parquet", row_group_size=100)
    with found.opened("run") as opened, pytest.raises(DataError, match=r"from row 48 of .*0400"):
        opened.gather(np.array([450]))


def test_a_read_that_fails_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = streamed(read(written(tmp_path / "rows"), tmp_path))
    monkeypatch.setattr(stream, "FIRST_WAIT_SECONDS", 0.01)
    tries = []
    into = found._fetcher.into

    def failing(block: int, folder: Path) -> None:
        tries.append(block)
        if len(tries) < 3:
            raise DataError("no route to host")
        into(block, folder)

    monkeypatch.setattr(found._fetcher, "into", failing)
    with found.opened("run") as opened:
        assert numbers(opened, np.array([999])) == [999]
    assert len(tries) == 3
    tries.extend([-1] * 100)
    monkeypatch.setattr(found._fetcher, "into", lambda *_: (_ for _ in ()).throw(DataError("gone")))
    with found.opened("run") as opened, pytest.raises(DataError, match="gone"):
        opened.gather(np.array([999]))


@pytest.mark.parametrize(
    "validation",
    [{"group": "kind", "fraction": 0.3}, {"time": "number", "fraction": 0.1}],
)
def test_splits_by_a_column(tmp_path: Path, validation: Any) -> None:
    folder = written(tmp_path / "rows")
    inputs = ["x", "number", "words"]
    whole = read(folder, tmp_path, stream=False, validation=validation, inputs=inputs)
    found = read(folder, tmp_path, validation=validation, inputs=inputs)
    assert found.facts["rows"] == whole.facts["rows"]
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
    found = cache.rows(data, tmp_path, {}, np.float64, where)
    with found.train.opened("run") as opened:
        for rows in np.array_split(RNG.permutation(NUM_ROWS), 20):
            assert numbers(opened, rows) == rows.tolist()
    for path in (tmp_path / "cache").rglob("*"):
        assert path.is_dir() or s3.SECRET.encode() not in path.read_bytes()
