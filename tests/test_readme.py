"""What the documents show works as it stands there, and is not stale."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from pipeline import cli
from pipeline.spec import load
from tests.benchmarks import __main__ as benchmarks
from tests.conftest import JOBS, Command, Write

ROOT = Path(__file__).parents[1]
README, JOB_SPECS, CODE, TESTS = (
    (ROOT / folder / "README.md").read_text() for folder in (".", "jobs", "pipeline", "tests")
)


def blocks(language: str, text: str = README) -> list[str]:
    """The fenced blocks in this language, in order."""
    fenced = text.split("```")[1::2]
    return [b.partition("\n")[2] for b in fenced if b.partition("\n")[0] == language]


SHELL = [line for block in blocks("") for line in block.splitlines()]
COMMANDS = sorted({line.partition("#")[0] for line in SHELL if line.startswith("pipeline ")})


def test_the_spec_on_the_first_screen_is_the_job_it_runs(tmp_path: Path) -> None:
    (shown,) = blocks("yaml")
    path = tmp_path / "shown.yaml"
    path.write_text(shown)
    assert load(path) == load(JOBS / "diabetes.yaml")


def test_the_custom_loss_model_and_metric_of_the_docs_work(
    job: Write, command: Command, tmp_path: Path
) -> None:
    shown = [*blocks("python"), *blocks("python", JOB_SPECS)]
    code = "\n".join(block for block in shown if "register(" in block)
    own = tmp_path / "from_readme.py"
    code = code.replace('"quantile"', '"quantile_of_readme"')  # jobs/custom_loss.py has it too
    own.write_text("import torch\nimport pipeline\n" + code)
    path = job({"loss": {"name": "quantile_of_readme", "level": 0.8}, "model": "my_net",
                "metrics": ["within_10"]})  # fmt: skip
    code_, out, err = command("run", path, "--import", own)
    assert code_ == 0, err
    assert "validation within_10" in out


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_line_is_one_the_command_takes(line: str) -> None:
    arguments = shlex.split(line.partition(">")[0])[1:]
    command = cli.cli.get_command(None, arguments[0])  # type: ignore[arg-type]
    assert command is not None, line
    if isinstance(command, click.Group):
        arguments = arguments[1:]
        command = command.commands[arguments[0]]
    with command.make_context(arguments[0], arguments[1:]) as context:
        assert context.params


def test_the_two_set_up_commands_are_one_line_each() -> None:
    setups = [line for line in SHELL if line.startswith("python3 -m venv")]
    assert len(setups) == 2
    assert "pipeline run jobs/diabetes.yaml" in setups[0]
    assert " && .venv/bin/pytest" in setups[1]


def test_the_map_has_every_module_with_the_first_line_of_its_docstring() -> None:
    for path in sorted((ROOT / "pipeline").rglob("*.py")):
        line = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
        row = line if path.name == "__init__.py" else f"| `{path.name}` | {line} |"
        assert row in CODE, f"pipeline/README.md lacks the row of {path}: {row}"
    names = re.findall(r"^\| `(\w+\.py)` \|", CODE, re.MULTILINE)
    assert len(names) == len(
        [p for p in (ROOT / "pipeline").rglob("*.py") if p.name[:6] != "__init"]
    )


@pytest.mark.parametrize(
    "text", [README, JOB_SPECS, CODE, TESTS], ids=["", "jobs", "code", "tests"]
)
def test_commands_beside_claims_name_tests_that_exist(text: str) -> None:
    for arguments in re.findall(r"`pytest ([^`]*)`", text):
        for path in re.findall(r"\S+\.py\b|tests/\S+", arguments):
            assert (ROOT / path).exists(), arguments
    for name in re.findall(r"python -m tests\.benchmarks (\w+)", text):
        assert name in benchmarks.NAMES


def test_the_readme_can_be_read_in_a_minute() -> None:
    assert len(README.splitlines()) <= 180


def test_help_teaches_every_command() -> None:
    for name in ("run", "check", "prove", "list", "schema", "sync", "cache"):
        shown = CliRunner().invoke(cli.cli, [name, "--help"])
        assert shown.exit_code == 0
        assert len(shown.output) > 100
