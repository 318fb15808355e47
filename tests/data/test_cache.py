"""The cache: converted once, found again, never half-made, never taken damaged."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import random
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data import cache
from pipeline.errors import DataError
from pipeline.spec import Cache
from pipeline.spec.data import Data
from tests.conftest import Command, Write
from tests.data.tables import converted, list_of, xy


def table(num_rows: int = 500) -> pa.Table:
    rng = np.random.default_rng(0)
    words = [["a", "b", "c"][: number % 4] for number in range(num_rows)]
    return pa.table(
        {
            "x": rng.normal(size=num_rows), "kind": rng.choice(["red", "blue"], num_rows),
            "words": pa.array(words, pa.list_(pa.string())), "y": rng.normal(size=num_rows),
        }
    )  # fmt: skip


@pytest.fixture
def made(tmp_path: Path) -> tuple[Data, Path, Cache]:
    pq.write_table(table(), tmp_path / "rows.parquet")
    data = Data(train="rows.parquet", target="y", validation=0.25)
    return data, tmp_path, Cache(folder=str(tmp_path / "cache"))


def read(made: tuple[Data, Path, Cache], said: list[str] | None = None) -> cache.ConvertedRows:
    data, base, where = made
    lines: list[str] = [] if said is None else said
    return cache.load_or_convert(data, base, {}, np.float32, where, report=lines.append)


def same(one: cache.ConvertedRows, other: cache.ConvertedRows) -> bool:
    return (
        one.fields == other.fields and one.fingerprint == other.fingerprint
        and bool((one.train.records == other.train.records).all())
        and bool((one.train.lists["words"].values == other.train.lists["words"].values).all())
    )  # fmt: skip


def entry(made: tuple[Data, Path, Cache]) -> Path:
    folder = Path(made[2].folder or "")
    (found,) = cache.entries(folder)
    return folder / found.name


def test_rows_are_converted_once(made: Any) -> None:
    first = read(made)
    stamp = (entry(made) / "manifest.json").stat().st_mtime_ns
    assert same(first, read(made))
    assert (entry(made) / "manifest.json").stat().st_mtime_ns == stamp


def test_other_rows_or_another_reading_of_them_are_converted_apart(made: Any) -> None:
    data, base, where = made
    first = read(made)
    other = read((data.model_copy(update={"scale": "min_max"}), base, where))
    assert other.fields != first.fields
    assert other.fingerprint == first.fingerprint, "the raw rows are the same"
    pq.write_table(table().slice(0, 400), base / "rows.parquet")
    assert read(made).fingerprint != first.fingerprint
    assert len(cache.entries(Path(where.folder))) == 3


@pytest.mark.parametrize("how", ["flip", "truncate"])
@pytest.mark.parametrize(
    "times",
    [pytest.param(200, marks=(pytest.mark.chaos, pytest.mark.timeout(3600)), id="all"),
     pytest.param(12, id="some")],
)  # fmt: skip
def test_damage_anywhere_is_noticed_and_repaired(made: Any, how: str, times: int) -> None:
    """Bits flipped and files cut at random places, in every kind of file that is kept."""
    first, chance = read(made), random.Random(0)
    files = [p for p in entry(made).rglob("*") if p.is_file() and p.name not in ("read", "used")]
    for path in sorted(files):
        whole = path.read_bytes()
        for _ in range(times):
            place = chance.randrange(len(whole))
            if how == "flip":
                flipped = bytes([whole[place] ^ (1 << chance.randrange(8))])
                path.write_bytes(whole[:place] + flipped + whole[place + 1 :])
            else:
                path.write_bytes(whole[:place])
            said: list[str] = []
            assert same(read(made, said), first)
            assert any("damaged" in line for line in said), (path.name, place)
            assert path.read_bytes() == whole or path.name == "manifest.json"


def test_a_file_that_is_missing_is_noticed_and_repaired(made: Any) -> None:
    first = read(made)
    (entry(made) / "train" / "records.npy").unlink()
    assert same(read(made), first)


def _convert(made: tuple[Data, Path, Cache], results: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    results.put((read(made).fingerprint, (entry(made) / "manifest.json").stat().st_mtime_ns))


@pytest.mark.processes
def test_of_several_processes_one_converts(made: Any) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_convert, args=(made, results)) for _ in range(4)]
    for process in processes:
        process.start()
    found = {results.get(timeout=120) for _ in processes}
    for process in processes:
        process.join()
    assert len(found) == 1, "one fingerprint, written at one time"


def test_what_a_killed_conversion_left_is_taken_away(made: Any) -> None:
    read(made)
    place = entry(made)
    left = place.parent / f".{place.name}.12345"
    place.rename(left)
    (left / "manifest.json").unlink()
    read(made)
    assert not left.exists()


def test_what_a_process_with_the_same_id_left_is_no_obstacle(made: Any) -> None:
    read(made)
    path = entry(made)
    path.rename(path.parent / f".{path.name}.{os.getpid()}")
    read(made)
    assert entry(made) == path


@pytest.mark.parametrize("after", [0, 3000])
def test_a_full_disk_is_an_error_and_leaves_nothing(
    made: Any, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.data import dataset

    written = [0]
    append = dataset._Array.append

    def full(self: Any, values: Any) -> None:
        written[0] += values.nbytes
        if written[0] > after:
            raise OSError(28, "No space left on device")
        append(self, values)

    monkeypatch.setattr(dataset._Array, "append", full)
    with pytest.raises(DataError, match=r"no room.*cache clear"):
        read(made)
    folder = Path(made[2].folder)
    assert [path for path in folder.glob("[!.]*") if path.is_dir()] == []


def test_what_was_not_used_for_longest_makes_room(made: Any) -> None:
    data, base, where = made
    for seed in range(3):
        read((data.model_copy(update={"split_seed": seed}), base, where))
        time.sleep(0.02)
    sizes = [one.size for one in cache.entries(Path(where.folder))]
    small = Cache(folder=where.folder, most_gib=2.5 * sizes[0] / 2**30)
    before = cache.entries(Path(where.folder))
    read((data.model_copy(update={"split_seed": 9}), base, small))
    after = {one.name for one in cache.entries(Path(where.folder))}
    assert before[0].name in after
    assert before[-1].name not in after
    assert len(after) == 2


def test_the_commands_show_and_delete(
    made: Any, job: Write, command: Command, tmp_path: Path
) -> None:
    where = tmp_path / "mine"
    assert command("check", job(), "--set", f"cache.folder={where}")[0] == 0
    code, out, _ = command("cache", "list", "--folder", where)
    assert code == 0
    assert "24 rows" in out
    assert "data.csv" in out
    name = out.split()[0]
    assert command("cache", "clear", "--folder", where, "nothing")[0] == 2
    assert "1 deleted" in command("cache", "clear", "--folder", where, name)[1]
    assert "0 in " in command("cache", "list", "--folder", where)[1]


def test_a_folder_that_cannot_be_created_is_an_error(made: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code = Cache(folder=str(tmp_path / "file" / "cache"))
    with pytest.raises(Exception, match="PIPELINE_CACHE"):
        read((made[0], made[1], code))


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(cuts=st.lists(st.integers(1, 499), max_size=6), group=st.integers(1, 300))
def test_files_may_be_cut_anywhere(
    cuts: list[int], group: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("layout")
    places = [0, *sorted(set(cuts)), 500]
    for number, (start, end) in enumerate(pairwise(places)):
        part = table().slice(start, end - start)
        pq.write_table(part, folder / f"{number}.parquet", row_group_size=group)
    whole = tmp_path_factory.mktemp("whole")
    pq.write_table(table(), whole / "0.parquet")
    data = Data(train="*.parquet", target="y", validation=0.25)
    found = [cache.load_or_convert(data, base, {}, np.float32, Cache()) for base in (folder, whole)]
    assert same(found[0], found[1])


def test_blocks_are_the_same_for_any_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums over many blocks too: 500 rows in blocks of 64."""
    from pipeline.data import reader

    monkeypatch.setattr(reader, "LARGEST_BLOCK", 64)
    found = []
    for name, group in (("one", 500), ("two", 77)):
        (tmp_path / name).mkdir()
        for start in range(0, 500, 500 if name == "one" else 90):
            part = table().slice(start, 500 if name == "one" else 90)
            pq.write_table(part, tmp_path / name / f"{start:03}.parquet", row_group_size=group)
        data = Data(train="*.parquet", target="y", validation=0.25)
        found.append(cache.load_or_convert(data, tmp_path / name, {}, np.float32, Cache()))
    assert same(*found)
    numbers = table()["x"].to_numpy()
    whole = Data(train="one/*.parquet", target="y")
    field = cache.load_or_convert(whole, tmp_path, {}, np.float32, Cache()).fields[0]
    assert field.mean == pytest.approx(numbers.mean(), rel=1e-13)
    assert field.deviation == pytest.approx(numbers.std(), rel=1e-13)


def test_other_rows_with_the_same_size_and_time_are_noticed(tmp_path: Path) -> None:
    first = list_of(converted(tmp_path, xy([1.0, 2.0, 3.0])), "x")
    path = tmp_path / "rows.parquet"
    before = path.stat()
    pq.write_table(xy([3.0, 2.0, 1.0]), tmp_path / "new.parquet")
    os.utime(tmp_path / "new.parquet", ns=(before.st_atime_ns, before.st_mtime_ns))
    (tmp_path / "new.parquet").replace(path)
    assert path.stat().st_size == before.st_size
    assert list_of(converted(tmp_path), "x") == first[::-1]


def test_trust_in_an_entry_is_not_renewed_by_trusting_it(tmp_path: Path) -> None:
    converted(tmp_path, xy([1.0, 2.0]))
    (entry,) = [p for p in (tmp_path / "c").iterdir() if not p.name.startswith(".")]
    os.utime(entry / "read", (1.0, 1.0))
    data = Data(train="rows.parquet", target="y", scale="none")
    where = Cache(folder=str(tmp_path / "c"))
    cache.load_or_convert(data, tmp_path, {}, np.float32, where, trusted_seconds=1e12)
    assert (entry / "read").stat().st_mtime == 1.0


def test_room_is_not_made_from_what_another_process_uses(tmp_path: Path) -> None:
    converted(tmp_path, xy([1.0, 2.0]))
    (name,) = [p.name for p in (tmp_path / "c").iterdir() if not p.name.startswith(".")]
    left = tmp_path / "c" / f".{name}.4242"
    left.mkdir()
    with (tmp_path / "c" / ".locks" / f"{name}.lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        cache._make_room(tmp_path / "c", 0, "another")
        assert (tmp_path / "c" / name).exists()
        assert left.exists()
    cache._make_room(tmp_path / "c", 0, "another")
    assert not (tmp_path / "c" / name).exists()
    assert not left.exists()
