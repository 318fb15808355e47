"""What shuffling an input costs, against scikit-learn's own permutations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import mean_squared_error

from pipeline.train.importance import MAX_ROWS, REPEATS, permutation_importance
from tests.data.tables import job_of

CPU = torch.device("cpu")
NUM_ROWS = 4 * MAX_ROWS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(1)
    a, b, c = rng.normal(size=(3, NUM_ROWS))
    made: Path = tmp_path_factory.mktemp("rows")
    frame = pd.DataFrame({"a": a, "b": b, "c": c, "y": 3 * a + b})
    frame.to_parquet(made / "rows.parquet")
    return made


def test_a_linear_model_relies_on_an_input_by_twice_its_squared_weight(folder: Path) -> None:
    """Of inputs with variance 1 that do not depend on each other, and a model without error."""
    job = job_of(folder, "rows.parquet", data={"scale": "none"})
    objective = job.objective()
    layer = next(m for m in objective.modules() if isinstance(m, torch.nn.Linear))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 1.0, 0.0]]))
        layer.bias.zero_()
    found = permutation_importance(objective, job.train, 64, CPU)
    assert found is not None
    assert found.loss == pytest.approx(0, abs=1e-9)
    assert found.num_rows == MAX_ROWS
    assert found.rises == pytest.approx({"a": 18, "b": 2, "c": 0}, rel=0.2, abs=1e-9)
    rows = np.linspace(0, NUM_ROWS - 1, MAX_ROWS).astype(int)
    a = pd.read_parquet(folder / "rows.parquet")["a"].to_numpy()[rows]
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(MAX_ROWS, generator=generator).numpy() for _ in range(REPEATS)]
    expected = np.mean([mean_squared_error(3 * a, 3 * a[order]) for order in orders])
    assert found.rises["a"] == pytest.approx(expected, rel=1e-5)


def test_inputs_for_which_there_is_no_time_are_named(folder: Path) -> None:
    job = job_of(folder, "rows.parquet")
    found = permutation_importance(job.objective(), job.train, 64, CPU, seconds=-1)
    assert found is not None
    assert (found.rises, found.left_out) == ({}, ["a", "b", "c"])


def test_of_one_input_there_is_nothing_to_say(folder: Path) -> None:
    job = job_of(folder, "rows.parquet", data={"inputs": ["a"]})
    assert permutation_importance(job.objective(), job.train, 64, CPU) is None
