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
        ({"scale": {"a": "minmax"}}, "a: expected standard, shared, min_max, log, robust, none; "
                                     "found 'minmax'; did you mean 'min_max'?"),
        ({"dates": {"a": ["weak"]}}, "did you mean 'week'?"),
        ({"dates": "a"}, "expected a list of columns: [a]"),
        ({"validation": {"fraction": 0.2, "grup": "a"}},
         "grup: unknown key; did you mean 'group'?"),
        ({"validation": {"since": 2, "group": "a", "time": "b"}}, "give one of group and time"),
        ({"validation": {"time": "a"}}, "give either `fraction` or `folds`, or with `time` its"),
        ({"validation": {"folds": 3}}, "`fold` and `folds` go together"),
        ({"validation": {"folds": 3, "fold": 4}}, "`fold` is 4, of only 3 `folds`"),
        ({"validation": {"folds": 3, "fold": 1, "time": "b"}}, "`folds` do not go with `time`"),
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
