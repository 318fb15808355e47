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
