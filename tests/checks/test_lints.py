"""What a job may do and its user rarely means."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipeline.errors import DataError
from tests.data.tables import FRAME, RNG, inputs, job_of, notices


@pytest.mark.parametrize(
    ("write", "name", "index"),
    [
        (lambda frame, path: frame.to_csv(path), "rows.csv", ""),
        (lambda frame, path: frame.reset_index(names="Unnamed: 0").to_csv(path, index=False),
         "rows.csv", "Unnamed: 0"),
        (lambda frame, path: frame.set_index(frame.index.rename("row") ** 2).to_parquet(path),
         "rows.parquet", "row"),
        (lambda frame, path: frame.set_index(frame.index * 2 + 1).to_parquet(path),
         "rows.parquet", "__index_level_0__"),
    ],
)  # fmt: skip
def test_pandas_index_is_no_input(write: Any, name: str, index: str, tmp_path: Path) -> None:
    frame = FRAME.copy()
    frame.index = pd.Index(np.arange(40) ** 2 % 41) if "level" in index else frame.index
    write(frame, tmp_path / name)
    made = job_of(tmp_path, name)
    assert inputs(made) == ["a"]
    assert re.search(rf"data.inputs: '{index}': the index that pandas wrote", notices(made))
    if index:
        assert inputs(job_of(tmp_path, name, data={"inputs": [index, "a"]})) == [index, "a"]
    else:
        with pytest.raises(DataError, match=r"a column of .* has no name"):
            job_of(tmp_path, name, data={"inputs": ["", "a"]})


def test_a_column_that_counts_the_rows_is_pointed_out(tmp_path: Path) -> None:
    FRAME.assign(number=np.arange(1, 41), age=RNG.integers(1, 41, 40)).to_csv(
        tmp_path / "rows.csv", index=False
    )
    found = notices(job_of(tmp_path, "rows.csv", data={"validation": 0.25}))
    assert "column 'number': counts the rows" in found
    assert "'age'" not in found


def test_the_unit_of_a_losss_option_is_explained(tmp_path: Path) -> None:
    FRAME.assign(y=FRAME["y"] * 100).to_csv(tmp_path / "rows.csv", index=False)
    loss = {"name": "huber", "delta": 50}
    found = notices(job_of(tmp_path, "rows.csv", loss=loss, data={"target_scale": "standard"}))
    deviation = (FRAME["y"] * 100).std(ddof=0)
    assert (
        f"delta 50 is in units of data.target_scale, {50 * deviation:.4g} in those of 'y'" in found
    )
    assert "delta" not in notices(job_of(tmp_path, "rows.csv", loss=loss))


def test_classes_are_not_scaled_and_amounts_are_no_classes(tmp_path: Path) -> None:
    FRAME.assign(y=["a", "b"] * 20).to_csv(tmp_path / "rows.csv", index=False)
    scaled = {"target_scale": "standard"}
    found = notices(job_of(tmp_path, "rows.csv", loss="cross_entropy", data=scaled))
    assert "data.target_scale: no target holds amounts" in found
    FRAME.to_csv(tmp_path / "rows.csv", index=False)
    with pytest.raises(DataError, match="for amounts take a loss such as mse"):
        job_of(tmp_path, "rows.csv", loss="cross_entropy")


@pytest.mark.parametrize(
    ("loss", "target", "scale"),
    [
        ("cox", ["time", "died"], {"time": "log"}),
        ("cox", ["time", "died"], "standard"),
        ("ordinal", "grade", {"grade": "robust"}),
        ("cross_entropy", "grade", "robust"),
        ("poisson_nll", "grade", "log"),
    ],
)
def test_a_scale_that_no_loss_reads_is_pointed_out(
    loss: str, target: Any, scale: Any, tmp_path: Path
) -> None:
    FRAME.assign(
        time=RNG.random(40), died=RNG.integers(0, 2, 40), grade=RNG.integers(0, 3, 40)
    ).to_csv(tmp_path / "rows.csv", index=False)
    data = {"inputs": ["a"], "target": target, "target_scale": scale}
    found = notices(job_of(tmp_path, "rows.csv", loss=loss, data=data))
    assert re.search("data.target_scale(: no target holds amounts| leaves it as it is)", found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"sampling": {"balance": "kind"}},
          "loss": {"name": "bce_with_logits", "pos_weight": "balanced"}},
         "loss.pos_weight: data.sampling.balance makes up for rare classes already"),
        ({"data": {"sampling": {"balance": "kind"}}},
         "data.sampling.balance: probabilities are those of balanced classes"),
        ({"training": {"average": {"ema": 0.9999}, "max_steps": 20}},
         "100% of the average are initial weights"),
        ({"schedule": {"name": "reduce_on_plateau", "patience": 60},
          "data": {"validation": 0.2}, "training": {"epochs": 10}},
         "patience 60 of 10 evaluations: the learning rate never falls"),
        ({"model": {"name": "mlp", "lora": {"match": "layers", "rank": 1}}},
         "model.lora: without model.init_from"),
    ],
)  # fmt: skip
def test_what_is_allowed_and_rarely_meant(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    FRAME.assign(kind=["a", "b"] * 20).to_csv(tmp_path / "rows.csv", index=False)
    data = {"inputs": ["a"], "target": "kind", **changes.get("data", {})}
    made = job_of(tmp_path, "rows.csv", **{"loss": "bce_with_logits"} | changes | {"data": data})
    assert message in notices(made)
