"""Sections of the spec that take more than one form."""

from __future__ import annotations

from pathlib import Path

from pipeline.spec.loader import load
from tests.conftest import MINIMAL


def test_a_range_of_workers_stands_in_for_their_number(tmp_path: Path) -> None:
    spec = load(MINIMAL | {"workers": {"min": 2, "max": 5}})
    assert (spec.workers.num, spec.workers.least, spec.workers.most) == (None, 2, 5)
    (tmp_path / "again.yaml").write_text(spec.dump())
    assert load(tmp_path / "again.yaml") == spec
    fixed = load(MINIMAL | {"workers": {"num": 3, "cpus_per_worker": 0.5}})
    assert (fixed.workers.least, fixed.workers.most, fixed.workers.threads) == (3, 3, 1)


def test_a_column_of_row_weights_can_be_a_bare_name() -> None:
    data = MINIMAL["data"] | {"sample_weight": "bmi"}  # type: ignore[operator]
    spec = load(MINIMAL | {"data": data})
    assert spec.data.sample_weight is not None
    assert spec.data.sample_weight.mean_over == "weights"
    assert spec.digest != load(MINIMAL).digest
