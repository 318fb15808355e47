"""The section `data` of a spec."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import Command, Write


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"missing": {"a": "men"}}, "a: expected error, drop, mean, category or {constant: value}; "
                                    "found 'men'; did you mean 'mean'?"),
        ({"missing": 0}, "(a constant goes by column)"),
        ({"scale": {"a": "minmax"}}, "a: expected standard, shared, min_max, log, none; "
                                     "found 'minmax'; did you mean 'min_max'?"),
        ({"dates": {"a": ["weak"]}}, "did you mean 'week'?"),
        ({"dates": "a"}, "expected a list of columns: [a]"),
        ({"validation": {"fraction": 0.2, "grup": "a"}},
         "grup: unknown key; did you mean 'group'?"),
        ({"validation": {"fraction": 0.2}}, "give either `group` or `time`"),
        ({"validation": {"time": "a"}}, "give either `fraction`, or with `time` its `since`"),
    ],
)  # fmt: skip
def test_a_slip_in_the_spec_is_one_clear_fault(
    change: dict[str, Any], said: str, job: Write, command: Command
) -> None:
    changes = {f"data.{key}": value for key, value in change.items()}
    code, _, err = command("check", job(changes))
    assert code == 2
    assert said in err
    assert "1 fault" in err or "faults" not in err
