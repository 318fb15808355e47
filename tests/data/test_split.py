"""Which side a row is on: its content decides, or its group, or its time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data import cache, locate, reader, split
from pipeline.errors import DataError
from pipeline.spec import Cache
from pipeline.spec.data import Data
from tests.data.tables import converted, xy

RNG = np.random.default_rng(0)
DAYS = np.datetime64("2024-01-01") + np.arange(2000)
TABLE = pa.table(
    {
        "x": RNG.normal(size=2000), "who": [f"patient {i // 10}" for i in range(2000)],
        "day": DAYS, "z": pa.array([[i, i + 1] for i in range(2000)]), "y": RNG.normal(size=2000),
    }
)  # fmt: skip


def sides(table: pa.Table, folder: Path, **data: Any) -> Any:
    """The split of each row."""
    pq.write_table(table, folder / "rows.parquet")
    asked = Data(**{"train": "rows.parquet", "target": "y", "inputs": ["x", "z"]} | data)
    train = reader.open_sources(locate.locate(asked, folder))["train"]
    splitter = split.Splitter(asked, train, {})
    side_of_row = np.full(len(table), "", "<U10")
    for block in train.blocks():
        for rows in splitter.split(train, block):
            assert (side_of_row[block.start + rows.positions] == "").all()
            side_of_row[block.start + rows.positions] = rows.split
    assert (side_of_row != "").all()
    return side_of_row


def held_out(table: pa.Table, folder: Path, validation: Any, **more: Any) -> Any:
    return sides(table, folder, validation=validation, **more) == "validation"


def test_about_the_fraction_is_held_out(tmp_path: Path) -> None:
    for fraction in (0.1, 0.5, 0.9):
        share = held_out(TABLE, tmp_path, fraction).mean()
        assert share == pytest.approx(fraction, abs=0.04)


def test_rows_stay_on_their_side_when_others_come_or_the_order_changes(tmp_path: Path) -> None:
    all_rows = held_out(TABLE, tmp_path, 0.2)
    assert (held_out(TABLE.slice(0, 700), tmp_path, 0.2) == all_rows[:700]).all()
    order = RNG.permutation(2000)
    assert (held_out(TABLE.take(order), tmp_path, 0.2) == all_rows[order]).all()


def test_another_seed_holds_out_others(tmp_path: Path) -> None:
    one, other = (held_out(TABLE, tmp_path, 0.2, split_seed=seed) for seed in (0, 1))
    assert (one & other).mean() == pytest.approx(0.04, abs=0.02)


def test_the_side_does_not_depend_on_how_numbers_are_stored(tmp_path: Path) -> None:
    whole = pa.table({"x": np.arange(100), "z": np.arange(100), "y": np.arange(100)})
    wide = whole.cast(pa.schema([(name, pa.float64()) for name in "xzy"]))
    assert (held_out(whole, tmp_path, 0.3) == held_out(wide, tmp_path, 0.3)).all()


def test_groups_stay_together(tmp_path: Path) -> None:
    found = held_out(TABLE, tmp_path, {"fraction": 0.3, "group": "who"})
    assert all(len(set(found[start : start + 10])) == 1 for start in range(0, 2000, 10))
    assert found.mean() == pytest.approx(0.3, abs=0.1)


def test_the_latest_rows_are_held_out(tmp_path: Path) -> None:
    order = RNG.permutation(2000)
    found = held_out(TABLE.take(order), tmp_path, {"fraction": 0.25, "time": "day"})
    assert found.sum() == 500
    assert DAYS[order][found].min() > DAYS[order][~found].max()
    since = held_out(TABLE, tmp_path, {"since": "2026-01-01", "time": "day"})
    assert (since == (np.datetime64("2026-01-01") <= DAYS)).all()


def test_the_column_that_decides_is_no_input_unless_named(tmp_path: Path) -> None:
    pq.write_table(TABLE.drop_columns("day"), tmp_path / "rows.parquet")
    validation: Any = {"fraction": 0.3, "group": "who"}
    data = Data(train="rows.parquet", target="y", validation=validation)
    rows = cache.load_or_convert(data, tmp_path, {}, np.float32, Cache())
    assert [field.name for field in rows.fields] == ["x", "z", "y"]


@pytest.mark.parametrize(
    ("validation", "said"),
    [
        ({"since": "soon", "time": "day"}, "data.validation.since: 'soon'"),
        ({"fraction": 0.2, "time": "who"}, "column 'who' is string: expected dates"),
        ({"since": "2099-01-01", "time": "day"}, "leaves 0 for validation"),
        ({"since": "1999-01-01", "time": "day"}, "0 for training"),
        ({"fraction": 0.2, "group": "whom"}, "no column 'whom'"),
    ],
)
def test_splits_that_cannot_be_are_refused(validation: Any, said: str, tmp_path: Path) -> None:
    pq.write_table(TABLE, tmp_path / "rows.parquet")
    data = Data(train="rows.parquet", target="y", inputs=["x"], validation=validation)
    with pytest.raises(DataError, match=said):
        cache.load_or_convert(data, tmp_path, {}, np.float32, Cache())


def test_the_latest_rows_are_as_near_to_the_fraction_as_equal_times_allow(tmp_path: Path) -> None:
    times = pa.array([1] * 10 + [2] * 90 + [3] * 9)
    table = xy([0.0] * 109).append_column("t", times)
    split = {"fraction": 0.1, "time": "t"}
    found = converted(tmp_path, table, inputs=["x"], validation=split)
    assert found.facts.rows == {"train": 100, "validation": 9}


def test_dropped_rows_are_on_no_side(tmp_path: Path) -> None:
    times = pa.array([*range(99), None])
    x = pa.array([1.0] * 55 + [None] * 44 + [1.0])
    table = pa.table({"x": x, "t": times, "y": np.zeros(100)})
    split = {"fraction": 0.4, "time": "t"}
    found = converted(tmp_path, table, inputs=["x"], validation=split, missing="drop")
    assert found.facts.rows == {"train": 33, "validation": 22}


def test_a_test_leaves_validation_rows_where_they_are_and_takes_others(tmp_path: Path) -> None:
    alone = sides(TABLE, tmp_path, validation=0.2)
    for test in (0.1, {"fraction": 0.1, "group": "who"}, {"fraction": 0.1, "time": "day"}):
        both = sides(TABLE, tmp_path, validation=0.2, test=test)
        assert (both == "test").mean() == pytest.approx(0.1, abs=0.04)
        rest = both != "test"
        assert (both[rest] == alone[rest]).all()
    by_rows = sides(TABLE, tmp_path, validation=0.2, test=0.1)
    assert (alone[by_rows == "test"] == "train").all()


def test_groups_stay_together_in_three_splits(tmp_path: Path) -> None:
    both = {
        "validation": {"fraction": 0.3, "group": "who"},
        "test": {"fraction": 0.3, "group": "who"},
    }
    by_row = sides(TABLE, tmp_path, **both)
    for who in set(TABLE["who"].to_pylist()):
        assert len(set(by_row[np.array(TABLE["who"]) == who])) == 1
    for split_name in ("train", "validation", "test"):
        assert (by_row == split_name).mean() == pytest.approx(0.35, abs=0.12)


def test_by_time_the_test_is_latest_and_validation_before_it(tmp_path: Path) -> None:
    order = RNG.permutation(2000)
    table = TABLE.take(order)
    fractions = {
        "validation": {"fraction": 0.2, "time": "day"},
        "test": {"fraction": 0.1, "time": "day"},
    }
    since = {
        "validation": {"since": str(DAYS[1400]), "time": "day"},
        "test": {"since": str(DAYS[1800]), "time": "day"},
    }
    for both in (fractions, since):
        by_row = sides(table, tmp_path, **both)
        assert set(order[by_row == "test"]) == set(range(1800, 2000))
        assert set(order[by_row == "validation"]) == set(range(1400, 1800))


def test_a_test_by_time_with_validation_files(tmp_path: Path) -> None:
    pq.write_table(TABLE.slice(0, 50).drop_columns("day"), tmp_path / "held.parquet")
    by_row = sides(
        TABLE, tmp_path, validation="held.parquet", test={"fraction": 0.1, "time": "day"}
    )
    assert np.flatnonzero(by_row == "test").tolist() == list(range(1800, 2000))
    assert (by_row[:1800] == "train").all()


def test_columns_that_only_the_test_goes_by_do_not_move_validation_rows(tmp_path: Path) -> None:
    alone = sides(TABLE, tmp_path, validation=0.2, inputs=["x", "day"])
    test = {"since": str(DAYS[1999]), "time": "day"}
    both = sides(TABLE, tmp_path, validation=0.2, inputs=["x", "day"], test=test)
    assert (both[:1999] == alone[:1999]).all()


CLASSES = pa.array(RNG.choice(["a", "b", "c"], 2000, p=[0.9, 0.08, 0.02]))
"""Of which one is rare."""


@pytest.mark.parametrize("by", [{}, {"group": "who"}, {"stratify": "kind"}], ids=str)
@pytest.mark.parametrize("test", [None, 0.2], ids=["all", "without test rows"])
def test_folds_hold_out_each_row_once(by: dict[str, str], test: Any, tmp_path: Path) -> None:
    table = TABLE.append_column("kind", CLASSES)
    each = [
        sides(table, tmp_path, validation={"folds": 4, "fold": fold, **by}, test=test)
        for fold in (1, 2, 3, 4)
    ]
    is_test = each[0] == "test"
    assert all(((one == "test") == is_test).all() for one in each)
    assert (sum((one == "validation").astype(int) for one in each) == ~is_test).all()
    sizes = [(one == "validation").sum() / (~is_test).sum() for one in each]
    assert sizes == pytest.approx([0.25] * 4, abs=0.002 if "stratify" in by else 0.06)
    if "group" in by:
        for one in each:
            held = one == "validation"
            groups = [set(held[at : at + 10][~is_test[at : at + 10]]) for at in range(0, 2000, 10)]
            assert all(len(sides_of) < 2 for sides_of in groups)


@pytest.mark.parametrize("split_of", ["validation", "test"])
def test_strata_are_held_out_to_the_row(split_of: str, tmp_path: Path) -> None:
    table = TABLE.append_column("kind", CLASSES)
    asked = {"fraction": 0.3, "stratify": "kind"}
    found = sides(table, tmp_path, **{split_of: asked}) == split_of
    kinds = np.array(CLASSES.to_pylist())
    for kind in "abc":
        here = kinds == kind
        assert found[here].sum() == pytest.approx(0.3 * here.sum(), abs=1)
    order = RNG.permutation(2000)
    again = sides(table.take(order), tmp_path, **{split_of: asked}) == split_of
    assert (again == found[order]).all()


def test_a_column_without_classes_has_no_strata(tmp_path: Path) -> None:
    amounts = pa.array(np.random.default_rng(0).normal(size=len(TABLE)))
    table = TABLE.append_column("amount", amounts)
    with pytest.raises(DataError, match=r"'amount' has [\d,]+ values in [\d,]+ rows"):
        held_out(table, tmp_path, {"fraction": 0.2, "stratify": "amount"})


@pytest.mark.parametrize("size", [2, 3, 7])
def test_small_classes_do_not_all_lack_the_same_fold(size: int, tmp_path: Path) -> None:
    num = 400 // size
    kinds = np.repeat([f"kind {i}" for i in range(num)], size)
    table = TABLE.slice(0, len(kinds)).append_column("kind", pa.array(kinds))
    each = [
        held_out(table, tmp_path, {"folds": 5, "fold": fold, "stratify": "kind"})
        for fold in range(1, 6)
    ]
    assert (sum(one.astype(int) for one in each) == 1).all()
    for one in each:
        assert one.mean() == pytest.approx(0.2, abs=0.06)
        of_class = one.reshape(num, size).sum(1)
        assert (abs(of_class - size / 5) < 1 + 1e-9).all()


def test_a_fraction_is_of_all_rows_whatever_the_test_takes(tmp_path: Path) -> None:
    table = TABLE.append_column("kind", CLASSES)
    by_class = {"stratify": "kind"}
    found = sides(table, tmp_path, test={"fraction": 0.5, **by_class},
                  validation={"fraction": 0.4, **by_class})  # fmt: skip
    assert (found == "test").mean() == pytest.approx(0.5, abs=0.002)
    assert (found == "validation").mean() == pytest.approx(0.4, abs=0.002)


def test_strata_of_amounts_and_of_missing_classes_are_refused(tmp_path: Path) -> None:
    table = TABLE.append_column("kind", pa.array([None, *CLASSES.to_pylist()[1:]]))
    with pytest.raises(DataError, match="no value, which belongs to no split"):
        held_out(table, tmp_path, {"fraction": 0.3, "stratify": "kind"})
    many = pa.table({"x": np.arange(11_000.0), "z": np.arange(11_000), "y": np.arange(11_000)})
    with pytest.raises(DataError, match="more than 10000 values; name a column of classes"):
        held_out(many, tmp_path, {"fraction": 0.3, "stratify": "x"})
    with pytest.raises(DataError, match="several values a row; name a column of classes"):
        held_out(TABLE, tmp_path, {"fraction": 0.3, "stratify": "z"})
