"""A job's lines, however its log is cut into pieces."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.cluster.client import Submission, _with_scheme
from pipeline.cluster.follow import Lines, exit_code, explain, last_words
from pipeline.errors import UsageError

LOG = (
    "2026-11-29 14:31:45,055\tINFO job_manager.py:581 -- Runtime env is setting up.\n"
    "Running entrypoint for job t-1: python -m pipeline run job/t.yaml\n"
    "run   t-1, 10 rows in this process\n"
    "epoch 1/2  step 3/6  loss 0.5\n"
    "{odd} words\n"
    '{"own": "words"}\n'
    '{"state": "finished", "steps": 6}\n'
    "see   pipeline ui runs/t-1"
)


def submission(**changes: Any) -> Submission:
    facts = {
        "id": "t-1", "job": "t", "identity": "i", "attempt": 1, "command": "", "status": "FAILED",
        "message": "", "exit_code": None, "started": 0.0, "ended": None,
    }  # fmt: skip
    return Submission(**{**facts, **changes})


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_lines_are_whole_and_rays_own_are_not_shown(size: int) -> None:
    shown: list[tuple[str, bool]] = []
    lines = Lines(lambda line, is_passing: shown.append((line, is_passing)), hides_result=True)
    for start in range(0, len(LOG), size):
        lines.add(LOG[start : start + size])
    lines.end()
    assert shown == [
        ("run   t-1, 10 rows in this process", False),
        ("epoch 1/2  step 3/6  loss 0.5", True),
        ("{odd} words", False),
        ('{"own": "words"}', False),
        ("see   pipeline ui runs/t-1", False),
    ]
    assert lines.result == {"state": "finished", "steps": 6}
    assert lines.num_chars == len(LOG)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"status": "SUCCEEDED", "exit_code": 0}, 0),
        ({"exit_code": 3}, 3),
        ({"exit_code": -9}, 137),
        ({}, 1),
        ({"status": "STOPPED"}, 143),
    ],
)
def test_exit_codes_are_the_commands_own(changes: dict[str, Any], code: int) -> None:
    assert exit_code(submission(**changes)) == code


def test_a_cluster_without_the_package_and_a_job_that_never_began_are_explained() -> None:
    lines = Lines(lambda line, is_passing: None)
    lines.add("/usr/bin/python: No module named pipeline\n")
    assert "has no `pipeline` package" in explain(submission(exit_code=1), lines)
    ended = submission(message="Failed to set up the runtime environment\nand more")
    assert explain(ended, Lines(lambda line, is_passing: None)).startswith("Failed to set up the")


@pytest.mark.parametrize(
    "address", ["http://host:abc", "http://[::1", "ftp://host", "http://host/path", "http://h?a=b"]
)
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(UsageError, match="expected the dashboard's, as http://HEAD:8265"):
        _with_scheme(address)


def test_an_address_without_port_or_scheme_is_filled_in() -> None:
    assert _with_scheme("head") == "http://head:8265"
    assert _with_scheme("http://head:80/") == "http://head:80"
    assert _with_scheme("https://head") == "https://head"


@pytest.mark.parametrize(
    ("log", "is_over", "says"),
    [
        (LOG, False, "epoch 1/2  step 3/6  loss 0.5"),
        (LOG, True, ""),
        (LOG + "\nerror: no such column\nTraceback\n", True, "error: no such column"),
        (LOG + "\ndone  6 steps\nsaved runs/t-1\n", False, "done  6 steps"),
        ("Running entrypoint for job t-1\n", False, ""),
    ],
)
def test_what_a_job_is_at_is_in_its_log(log: str, is_over: bool, says: str) -> None:
    assert last_words(log, is_over) == says
