"""Faults of a spec, as its author reads them."""

from __future__ import annotations

import pytest

from pipeline.errors import SpecError
from pipeline.spec.loader import load
from tests.conftest import Write


def test_faults_come_in_the_order_of_the_lines(job: Write) -> None:
    path = job({"training.epochs": 0, "data.inptus": ["a"], "modle": "linear"})
    with pytest.raises(SpecError) as raised:
        load(path)
    lines = [fault.line or 0 for fault in raised.value.faults]
    assert lines == sorted(lines)
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("training.threshold", 1.5,
         "must be less than 1 or 'f1', 'balanced_accuracy' or 'accuracy', found 1.5"),
        ("training.threshold", "precision",
         "must be a number or 'f1', 'balanced_accuracy' or 'accuracy', found 'precision'"),
        ("data.validation", {"folds": 1, "fold": 1}, "folds: must be greater than or equal to 2"),
    ],
)  # fmt: skip
def test_a_value_of_several_kinds_has_one_fault(
    key: str, value: object, problem: str, job: Write
) -> None:
    with pytest.raises(SpecError) as raised:
        load(job({key: value}))
    assert [fault.problem for fault in raised.value.faults] == [problem]
