"""Each benchmark still runs: as little of it as shows that."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from tests.benchmarks.__main__ import NAMES, main

SLOW = (
    "curves",
    "flights",
    "memory",
    "outages",
    "page",
    "predict",
    "recovery",
    "same_bits",
    "startup",
    "step",
    "submit",
    "throughput",
    "tracking",
)


@pytest.mark.ray
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.chaos) if n in SLOW else n for n in NAMES]
)
def test_a_benchmark_gives_a_line_of_json_for_each_result(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPELINE_CACHE", "")  # which some benchmarks set: put back afterwards
    monkeypatch.delenv("PIPELINE_CACHE")
    done = CliRunner().invoke(main, [name, "--quick"], catch_exceptions=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"benchmark"')]
    assert lines
    for line in lines:
        assert json.loads(line)["case"]


def test_without_a_name_they_are_listed() -> None:
    listed = CliRunner().invoke(main, []).stdout
    assert all(name in listed for name in NAMES)
