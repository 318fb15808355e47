"""Who runs what, from which code: the tags that MLflow's page shows as user and source."""

from __future__ import annotations

import getpass
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from pipeline.redact import redact

RAY_JOB, RAY_JOBS = "ray.job_id", "ray.job_ids"
"""Tags of a run: its Ray job, the last one where several resumed it, and all of these."""
LARGEST_DIFF = 100_000
"""Characters of the changes to the code that are recorded at most."""


def source_tags() -> dict[str, str]:
    """MLflow's own tags of a run, as its fluent API would set them, and Ray's job."""
    job_id = ray_job_id()
    submitted = os.environ.get("PIPELINE_SOURCE", "")
    if job_id and Path(submitted).is_file():  # who submitted the job knows more of it
        return {**json.loads(Path(submitted).read_text()), "mlflow.source.type": "JOB",
                RAY_JOB: job_id}  # fmt: skip
    tags = {
        "mlflow.user": _user(),
        "mlflow.source.name": _spec_path() or sys.argv[0],
        "mlflow.source.type": "JOB" if job_id else "LOCAL",
        **_git_tags(),
    }
    return tags | ({RAY_JOB: job_id} if job_id else {})


def _spec_path() -> str:
    """The job spec that this command names; the page shows the last part of the tag."""
    return next((word for word in sys.argv[1:] if word.endswith((".yaml", ".yml"))), "")


def command() -> str:
    """This process's command as it could be typed again, without passwords."""
    program, *arguments = sys.argv
    path = Path(program)
    is_module = path.name == "__main__.py"
    name = path.parent.name if is_module else path.name
    words = [name] if name == "pipeline" else ["python", program]
    return redact(shlex.join([*words, *arguments]))


def diff() -> str:
    """Changes to the code since its commit, of the folder that the command was started in."""
    return redact(_git("diff", "HEAD"))[:LARGEST_DIFF]


def ray_job_id() -> str:
    """Submission id of the Ray job whose entry point this command is, if it is one."""
    if job_id := os.environ.get("RAY_JOB_SUBMISSION_ID", ""):
        return job_id
    try:
        config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
        return str(config.get("metadata", {}).get("job_submission_id", ""))
    except ValueError:
        return ""


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # in a container, an id without a name
        return str(os.getuid())


def _git_tags() -> dict[str, str]:
    """Commit, branch and address of the repository, and whether files differ from the commit."""
    commit = _git("rev-parse", "HEAD")
    if not commit:
        return {}
    changed = _git("status", "--porcelain", "--untracked-files=no")
    tags = {
        "mlflow.source.git.commit": commit,
        "mlflow.source.git.branch": _git("branch", "--show-current"),
        "mlflow.source.git.repoURL": redact(_git("remote", "get-url", "origin")),
        "mlflow.source.git.dirty": str(bool(changed)).lower(),
        "mlflow.source.git.diff": diff() if changed else "",
    }
    return {key: value for key, value in tags.items() if value}


def _git(*arguments: str) -> str:
    """What git prints; nothing if it fails, as outside of a repository."""
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
