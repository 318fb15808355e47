"""Missing and invalid values, and what the spec makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import DataError
from tests.data.tables import converted, list_of, people, values_of, xy


@pytest.mark.parametrize(
    ("values", "constant", "categorical"),
    [([1, None, 2], 1.5, True), (["a", None], 0, False), ([True, None], "maybe", False),
     ([1, None], "abc", True), ([1, None], "abc", False)],
)  # fmt: skip
def test_a_constant_that_the_column_cannot_hold_is_refused(
    values: Any, constant: Any, categorical: bool, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"data\.missing\.x\.constant"):
        converted(tmp_path, xy(values), missing={"x": {"constant": constant}},
             categorical=["x"] if categorical else [])  # fmt: skip


def test_missing_booleans_can_be_one_of_the_two(tmp_path: Path) -> None:
    found = converted(tmp_path, xy([True, None, False]), missing={"x": {"constant": "true"}})
    assert list_of(found, "x") == [2, 2, 1]


def test_weights_have_no_mean(tmp_path: Path) -> None:
    table = xy([1.0, None]).append_column("w", pa.array([1.0, 2.0]))
    found = converted(tmp_path, table, missing="mean", sample_weight="w")
    assert list_of(found, "w") == [1, 2]
    with pytest.raises(DataError, match=r"data\.missing\.w"):
        converted(tmp_path, table, missing={"w": "mean", "x": "mean"}, sample_weight="w")


def test_missing_values_are_refused_unless_the_spec_says_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(DataError) as raised:
        people(tmp_path, inputs=["age", "city"])
    text = str(raised.value)
    assert "data.inputs: column 'age' has missing values in 2 rows, first at row 1, 4" in text
    assert "data.inputs: column 'city' has missing values in 1 row, first at row 2" in text
    assert "data.target: column 'y' has missing values in 1 row, first at row 2" in text
    assert "data.missing" in text


def test_rows_with_missing_values_can_be_dropped(tmp_path: Path) -> None:
    found = people(tmp_path, inputs=["age", "city"], missing="drop", scale="none")
    assert values_of(found, "age").tolist() == [20, 60, 40]
    assert values_of(found, "y").tolist() == [1, 4, 6]
    assert found.facts.dropped == 3
    assert found.fields[0].mean == 0


def test_each_column_can_have_its_own_policy_for_missing_values(tmp_path: Path) -> None:
    policy: Any = {"age": "mean", "city": "category", "y": "drop"}
    found = people(tmp_path, inputs=["age", "city"], missing=policy, scale="none")
    assert values_of(found, "age").tolist() == [20, 40, 60, 40, 40]
    assert values_of(found, "city").tolist() == [1, 2, 1, 2, 3]
    assert found.fields[1].num_codes == 5, "unknown, A, B, C, missing"
    policy = {"age": {"constant": -1}, "city": {"constant": "Z"}, "y": {"constant": 0}}
    found = people(tmp_path, inputs=["age", "city"], missing=policy, scale="none")
    assert values_of(found, "age").tolist() == [20, -1, 40, 60, -1, 40]
    assert values_of(found, "city").tolist() == [1, 2, 4, 1, 2, 3]
    assert values_of(found, "y").tolist() == [1, 2, 0, 4, 5, 6]
    missing = people(tmp_path, inputs=["city"], missing={"city": "category", "y": "drop"})
    assert missing.fields[0].num_codes == 5


def test_the_mean_is_that_of_the_training_rows(tmp_path: Path) -> None:
    table = pa.table({"x": [1.0, 3.0, None, 100.0], "day": [1, 2, 3, 4], "y": [1.0, 2, 3, 4]})
    split: Any = {"since": 3, "time": "day"}
    found = people(tmp_path, table, inputs=["x"], missing="mean", scale="none", validation=split)
    assert found.validation is not None
    held: Any = found.validation.gather(np.arange(2))["x"]
    assert held.tolist() == [2, 100]


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ({"city": "mean", "y": "drop", "age": "mean"}, "data.missing.city"),
        ({"age": "category", "y": "drop"}, "data.missing.age"),
        ({"age": {"constant": "x"}, "y": "drop"}, "'x', which is not a number"),
        ({"town": "drop"}, "data.missing: 'town'"),
        ("mean", "column 'city' has missing values in 1"),
    ],
)
def test_policies_that_do_not_fit_are_refused(missing: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        people(tmp_path, inputs=["age", "city"], missing=missing)


def test_infinity_is_never_taken(tmp_path: Path) -> None:
    table = pa.table({"x": [1.0, float("inf")], "y": [1.0, 2.0]})
    with pytest.raises(DataError, match=r"'x' has infinity.* in 1 row, first at row 1"):
        people(tmp_path, table, missing="drop")


def test_a_column_of_nothing_is_refused(tmp_path: Path) -> None:
    table = pa.table({"x": pa.array([None, None], pa.float64()), "y": [1.0, 2.0]})
    with pytest.raises(DataError, match="no value in any training row"):
        people(tmp_path, table, missing="mean")
    with pytest.raises(DataError, match=r"no rows in .*2 dropped"):
        people(tmp_path, table, missing="drop")
