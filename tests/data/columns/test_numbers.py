"""Columns of numbers: scaled with the training rows, in tensors and lists too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.preprocessing import RobustScaler

from pipeline.data.columns import Series, encode
from pipeline.errors import DataError
from tests.conftest import Command, Write
from tests.data.tables import (
    RNG,
    converted,
    fitted,
    job_of,
    numbers_of,
    people,
    values_of,
    vectors,
    xy,
)


def test_numbers_are_standardised_with_the_training_rows_mean() -> None:
    fields, columns = fitted(["amount", "count"])
    assert fields["amount"].mean == 2.5
    assert float(columns["amount"].mean()) == pytest.approx(0, abs=1e-6)
    assert float(columns["amount"].std(correction=0)) == pytest.approx(1)
    assert columns["count"].dtype == torch.float32


def test_scale_none_leaves_numbers_as_they_are() -> None:
    _, columns = fitted(["amount"], scale="none")
    assert columns["amount"].tolist() == [1, 2, 3, 4]


def test_fixed_lists_become_tensors() -> None:
    fields, columns = fitted(["pair", "grid"], scale="none")
    assert columns["pair"].tolist() == [[1, 2], [3, 4], [5, 6], [7, 8]]
    assert fields["grid"].shape == (2, 2)
    assert columns["grid"].shape == (4, 2, 2)


def test_numbers_can_be_scaled_by_range_or_logarithm(tmp_path: Path) -> None:
    scale: Any = {"income": "log", "age": "min_max"}
    missing: Any = {"age": "mean", "y": "drop"}
    found = people(tmp_path, inputs=["age", "income"], scale=scale, missing=missing)
    assert values_of(found, "age").tolist() == [0, 0.5, 1, 0.5, 0.5]
    logs = np.log1p([0.0, 9.0, 999.0, 9.0, 0.0])
    expected = (logs - logs.mean()) / logs.std()
    assert values_of(found, "income") == pytest.approx(expected, rel=1e-6)
    table = pa.table({"x": [0.0, -1.0], "y": [1.0, 2.0]})
    with pytest.raises(DataError, match="above -1"):
        people(tmp_path, table, scale="log")


def test_a_robust_scale_is_scikit_learns(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, vectors = rng.lognormal(size=40), rng.lognormal(size=(40, 3))
    same = np.ones(40)  # between whose quartiles there is nothing
    table = pa.table({"x": x, "v": list(vectors), "same": same, "y": rng.normal(size=40)})
    found = converted(tmp_path, table, scale="robust", inputs=["x", "v", "same"])
    for name, column in (("x", x[:, None]), ("v", vectors), ("same", same[:, None])):
        expected = RobustScaler().fit_transform(column)
        assert values_of(found, name).reshape(expected.shape) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["fixed", "lists"])
def test_each_position_of_a_vector_has_its_own_mean_and_deviation(
    kind: str, tmp_path: Path
) -> None:
    values = RNG.normal(size=(300, 2)) * [1.0, 1000.0] + [0.0, 5e6]
    table = pa.table({"v": vectors(values, kind), "y": values[:, 0] * 2})
    pq.write_table(table, tmp_path / "rows.parquet")
    made = job_of(tmp_path, "rows.parquet")
    np.testing.assert_allclose(
        numbers_of(made, "v"), (values - values.mean(0)) / values.std(0), atol=1e-5
    )
    shared = job_of(tmp_path, "rows.parquet", data={"scale": {"v": "shared"}})
    wanted = (values - values.mean()) / values.std()
    np.testing.assert_allclose(numbers_of(shared, "v"), wanted, atol=1e-5)
    (field,) = [field for field in made.fields if field.is_input]
    served = encode([field], pa.table({"v": vectors(values[:3], kind)}))["v"]
    np.testing.assert_allclose(
        np.asarray(served), ((values - values.mean(0)) / values.std(0))[:3], atol=1e-5
    )
    with pytest.raises(DataError, match=r"do not hold .*2.* numbers"):
        encode([field], pa.table({"v": pa.array([[1.0, 2.0, 3.0]])}))


@pytest.mark.processes
def test_whole_numbers_beyond_64_bits_are_read_by_their_names(
    job: Write, command: Command, tmp_path: Path
) -> None:
    ids = pa.array([2**64 - 1 - i % 3 for i in range(24)], pa.uint64())
    pq.write_table(pa.table({"id": ids, "y": RNG.normal(size=24)}), tmp_path / "ids.parquet")
    changes = {"data.train": "ids.parquet", "data.inputs": ["id"]}
    code, _, err = command("check", job(changes))
    assert code == 2
    assert "list the column in data.categorical" in err
    code, out, err = command("run", job({**changes, "data.categorical": ["id"]}))
    assert code == 0, out + err


def test_numbers_beyond_float32_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1e\+39.*beyond float32"):
        converted(tmp_path, xy([1e39, 1.0, 2.0]))


def test_the_row_of_a_bad_logarithm_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="first at row 3"):
        converted(tmp_path, xy([None, None, 1.0, -3.0]), missing="mean", scale="log")
    with pytest.raises(DataError, match="numbers of -1 or less"):
        converted(tmp_path, xy([[1.0, 2.0], [5.0, -2.0]]), scale="log")


@pytest.mark.parametrize("order", [[[[], []], [[1.0, 2.0], [3.0, 4.0]]], [[[1.0, 2.0]], [[]]]])
def test_lists_of_one_length_are_vectors_whatever_block_comes_first(order: Any) -> None:
    """An empty list is another length, also before any number was seen."""
    statistics = Series("v", "list<double>").statistics("standard")
    for block in order:
        statistics.observe(pa.array(block, pa.list_(pa.float64())))
    assert isinstance(statistics.fit(), Series)
