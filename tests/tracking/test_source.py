"""Who ran what from which code, as MLflow's page shows it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.tracking import source


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for arguments in (
        ["init", "-q", "-b", "trunk"],
        ["config", "user.email", "a@b.c"],
        ["config", "user.name", "a"],
        ["remote", "add", "origin", "https://me:s3cret@host/repo.git"],
    ):
        subprocess.run(["git", *arguments], check=True)
    (tmp_path / "job.yaml").write_text("a: 1\n")
    subprocess.run(["git", "add", "."], check=True)
    subprocess.run(["git", "commit", "-q", "-m", "first"], check=True)
    return tmp_path


def test_commit_branch_and_repository_are_tags(repository: Path) -> None:
    tags = source.source_tags()
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip()
    assert tags["mlflow.source.git.commit"] == commit
    assert tags["mlflow.source.git.branch"] == "trunk"
    assert tags["mlflow.source.git.repoURL"] == "https://***@host/repo.git"
    assert tags["mlflow.source.git.dirty"] == "false"
    assert "mlflow.source.git.diff" not in tags
    assert tags["mlflow.user"]
    assert tags["mlflow.source.type"] == "LOCAL"


def test_changes_since_the_commit_are_kept(repository: Path) -> None:
    (repository / "job.yaml").write_text("a: 2\n")
    tags = source.source_tags()
    assert tags["mlflow.source.git.dirty"] == "true"
    assert "-a: 1\n+a: 2" in tags["mlflow.source.git.diff"]


def test_without_a_repository_there_are_no_tags_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_JOB_SUBMISSION_ID", "raysubmit_1")
    tags = source.source_tags()
    assert not [key for key in tags if "git" in key]
    assert (tags["mlflow.source.type"], tags["ray.job_id"]) == ("JOB", "raysubmit_1")


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["/venv/bin/pipeline", "run", "my job.yaml"], "pipeline run 'my job.yaml'"),
        (["/src/pipeline/__main__.py", "run", "a.yaml"], "pipeline run a.yaml"),
        (
            ["train.py", "--data", "s3://key:secret@bucket/x"],
            "python train.py --data s3://***@bucket/x",
        ),
    ],
)
def test_the_command_can_be_typed_again_and_has_no_password(
    words: list[str], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", words)
    assert source.command() == command


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["pipeline", "run", "jobs/a.yaml", "--set", "storage=/tmp/x"], "jobs/a.yaml"),
        (["/home/me/train.py"], "/home/me/train.py"),
    ],
)
def test_the_source_is_the_spec_or_the_script(
    words: list[str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", words)
    assert source.source_tags()["mlflow.source.name"] == name
