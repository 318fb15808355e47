"""Columns of classes: codes of a vocabulary, with unknown and missing ones."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq

from pipeline.data.bind import fit_table as fit
from pipeline.data.columns import Reading
from pipeline.spec.data import Data
from tests.data.tables import MIXED, batch_of, converted, fitted, job_of, list_of, numbers_of, xy


def test_text_booleans_and_dictionaries_become_codes_from_one() -> None:
    fields, columns = fitted(["color", "coded", "flag"])
    assert fields["color"].vocabulary == ("blue", "green", "red")
    assert columns["color"].tolist() == [3, 1, 3, 2]
    assert columns["coded"].tolist() == [1, 2, 1, 2]
    assert columns["flag"].tolist() == [2, 1, 2, 2]
    assert fields["color"].num_codes == 4


def test_whole_numbers_can_be_names() -> None:
    fields, columns = fitted(["label"], categorical=["label"])
    assert fields["label"].vocabulary == (10, 20, 30)
    assert columns["label"].tolist() == [1, 3, 1, 2]


def test_unknown_categories_get_the_code_of_the_unknown() -> None:
    fields, _ = fitted(["color"])
    other = pa.table({"color": ["pink", "red", None]})
    columns = batch_of([fields["color"]], other)
    assert columns["color"].tolist() == [0, 3, 0]


def test_target_classes_keep_the_order_of_their_labels() -> None:
    data = Data(train="x", inputs=["amount"], target="label")
    fields = fit(data, MIXED, {"label": Reading(as_classes=True)})
    assert fields[-1].counts == (2, 1, 1)
    columns = batch_of(fields, MIXED)
    assert columns["label"].tolist() == [0, 2, 0, 1]


def test_ignored_class_numbers_are_no_class() -> None:
    table = pa.table({"x": [1.0, 2.0, 3.0], "k": [5, -100, 7]})
    fields = fit(
        Data(train="x", inputs=["x"], target="k"),
        table,
        {"k": Reading(as_classes=True, ignored=-100)},
    )
    assert fields[-1].vocabulary == (5, 7)
    columns = batch_of(fields, table)
    assert columns["k"].tolist() == [0, -100, 1]


def test_one_unseen_category_does_not_change_the_others(tmp_path: Path) -> None:
    pq.write_table(xy([1, 2, 3, 2**63], pa.uint64()), tmp_path / "held.parquet")
    found = converted(
        tmp_path, xy([1, 2, 3], pa.uint64()), validation="held.parquet", categorical=["x"]
    )
    assert list_of(found, "x", "validation") == [1, 2, 3, 0]
    assert list_of(
        converted(tmp_path, xy([2**64 - 1, 1], pa.uint64()), categorical=["x"]), "x"
    ) == [2, 1]


def test_classes_may_be_numbers_of_any_size(tmp_path: Path) -> None:
    table = pa.table({"a": [1.0, 2.0], "y": pa.array([2**64 - 1, 1], pa.uint64())})
    pq.write_table(table, tmp_path / "rows.parquet")
    job = job_of(tmp_path, "rows.parquet", loss="cross_entropy")
    (field,) = (field for field in job.fields if field.is_target)
    assert field.vocabulary == (1, 2**64 - 1)
    assert numbers_of(job, "y").tolist() == [1, 0]
