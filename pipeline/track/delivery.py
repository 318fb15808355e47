"""The launcher's side of the record: what is handed to the delivering process, and its answer.

Nothing here imports MLflow, and the training process never waits for it: `deliver` runs beside it
and reads the run's folder.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import platform
import re
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import plugins
from pipeline import spec as specs
from pipeline.errors import RecordError, UsageError
from pipeline.redact import redacted
from pipeline.spec import JobSpec
from pipeline.train import files
from pipeline.train.files import write_json

if TYPE_CHECKING:
    import pyarrow as pa

    from pipeline.train.job import Job


ALONE = "alone"
"""Says to the delivery that no command trains the run."""
SCHEMES = ("databricks", "file", "http", "https", "mssql", "mysql", "postgresql", "sqlite")
"""Of tracking URIs that MLflow takes; plugins add theirs."""


def prepare(spec: JobSpec, job: Job, folder: Path, modules: list[str]) -> None:
    """Write what MLflow is told besides the curve: spec, tags, fields and example rows."""
    from pipeline.train import determinism

    launcher = {"id": uuid.uuid4().hex, "pid": os.getpid(), "host": socket.gethostname()}
    tags = {
        "pipeline.run": _token(folder),
        "pipeline.launcher": launcher["id"],
        "pipeline.spec_digest": spec.digest,
        "pipeline.data_fingerprint": job.fingerprint,
        "pipeline.storage": str(folder),
        "pipeline.versions": _versions(),
        "pipeline.bits": json.dumps(determinism.fingerprint(spec)),
        "pipeline.bits_sha256": determinism.fingerprint_sha256(spec),
        **_git(),
    }
    if modules:
        tags["pipeline.imports"] = plugins.sources_sha256(modules)
    if job_id := os.environ.get("RAY_JOB_SUBMISSION_ID") or _submission():
        tags["ray.job_id"] = job_id
    before = recorded(folder)  # of a run that goes on: its record stays where it began
    started_in = before.get("tracking_uri") if "run_id" in before else None
    record = {
        "name": folder.name,
        "job": spec.name,
        "experiment": spec.tracking.experiment or spec.name,
        "register_as": spec.tracking.register_as,
        "tracking_uri": started_in or redacted(tracking_uri(folder.parent)),
        "params": params(spec),
        "data": _data(job),
        "spec": spec.dump(),
        "fields": [field.to_json() for field in job.fields],
        "example": _encoded(job.example),
        "tags": tags,
        "modules": modules,
        "num_workers": spec.workers.most,
        "launcher": launcher,
        "is_copied": spec.checkpoint.copy_to is not None,
    }
    for name in (files.RECORD, files.ENDED, files.RECORDED):  # of commands that were killed
        files.delete_asides(folder / name)
    write_json(folder / files.RECORD, record)
    if (folder / files.RECORDED).exists():
        before.pop("error", None)
        write_json(folder / files.RECORDED, {**before, "complete": False})
    for path in folder.glob(files.TRACEBACKS):  # of the attempts before
        path.unlink()
    (folder / files.ENDED).unlink(missing_ok=True)
    (folder / files.STOP).unlink(missing_ok=True)
    (folder / "spec.yaml").write_text(spec.dump(), encoding="utf-8")


def _token(folder: Path) -> str:
    """What tells this run from all others, also when it goes on."""
    try:
        known: str = files.read_json(folder / files.RECORD)["tags"]["pipeline.run"]
    except (OSError, ValueError, KeyError):
        return uuid.uuid4().hex
    return known


def _encoded(table: pa.Table) -> str:
    """A small table as text."""
    import pyarrow as pa

    made = io.BytesIO()
    with pa.ipc.new_file(made, table.schema) as writer:
        writer.write_table(table)
    return base64.b64encode(made.getvalue()).decode()


def params(spec: JobSpec) -> dict[str, str]:
    """The whole spec as MLflow's params."""
    return {mlflow_key(key): _text(value) for key, value in specs.flat(spec).items()}


def _data(job: Job) -> dict[str, Any]:
    """The rows as MLflow's data set: where from, which columns, and numbers about them."""
    facts = job.facts
    columns = {
        field.name: {
            "kind": field.kind, "type": field.arrow_type,
            "role": field.role,
        }
        for field in job.fields
    }  # fmt: skip
    return {
        "name": job.spec.name,
        "digest": job.fingerprint[:36],
        "source": {"files": facts["files"], "num_files": facts["num_files"]},
        "columns": columns,
        "profile": {
            "fingerprint": job.fingerprint, "rows": facts["rows"], "dropped": facts["dropped"],
            "columns": facts["profile"],
        },
    }  # fmt: skip


def tracking_uri(storage: Path) -> str:
    """MLflow's address: the environment's, or a SQLite file beside the runs.

    Raises UsageError for one that MLflow cannot take.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI")
    scheme = given.partition(":")[0].partition("+")[0].lower() if given and ":" in given else ""
    if scheme and scheme not in SCHEMES:
        added = {entry.name for entry in entry_points(group="mlflow.tracking_store")}
        if scheme not in added:
            known = ", ".join(sorted({*SCHEMES, *added}))
            raise UsageError(f"MLFLOW_TRACKING_URI: MLflow knows no {scheme}:// (but {known})")
    if not given and set("?%") & set(str(storage)):
        raise UsageError(
            f"storage: {storage} has a '?' or '%', which MLflow cannot have in the address of a "
            "SQLite file: take another folder, or set MLFLOW_TRACKING_URI"
        )
    return given or f"sqlite:///{storage / 'mlflow.db'}"


def with_password(uri: str) -> str:
    """MLflow's address as it can be used: records hide passwords, the environment has them."""
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    return given if redacted(given) == uri else uri


LONGEST_KEY = 250


def mlflow_key(name: str) -> str:
    """The name of a metric or param as MLflow takes it: itself, or what is left with a mark.

    MLflow refuses some characters, more than 250 of them, and what is no plain path. The mark
    keeps names apart that would become one.
    """
    parts = re.sub(r"[^\w .:/-]", "_", name).split("/")
    made = "/".join("_" if part in ("", ".", "..") else part for part in parts)
    if made == name and len(made) <= LONGEST_KEY:
        return name
    mark = hashlib.sha256(name.encode()).hexdigest()[:6]
    return f"{made[: LONGEST_KEY - len(mark) - 1]}-{mark}"


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list | dict) else str(value)


def _versions() -> str:
    packages = ("pipeline", "torch", "ray", "mlflow", "pyarrow", "numpy")
    found = [f"{package} {version(package)}" for package in packages]
    return ", ".join([f"python {platform.python_version()}", *found])


def _git() -> dict[str, str]:
    """Commit of the folder the command was started in, marked when files differ from it."""

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(
                ["git", *arguments], capture_output=True, text=True, timeout=5, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "HEAD")
    if not commit:
        return {}
    changed = git("status", "--porcelain", "--untracked-files=no")
    return {"mlflow.source.git.commit": commit, "pipeline.git_changed": str(bool(changed)).lower()}


def _submission() -> str:
    """Submission id of the Ray job this command is the entry point of."""
    try:
        config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
        return str(config.get("metadata", {}).get("job_submission_id", ""))
    except ValueError:
        return ""


def start(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    """The process that delivers the run's record, apart from the terminal's Ctrl-C."""
    with (folder / "deliver.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline.track.deliver", str(folder), *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def end(
    process: subprocess.Popen[bytes], folder: Path, state: str, tell: Callable[[str], None],
    reason: str = "", signals: Sequence[int] = (),
) -> dict[str, Any]:  # fmt: skip
    """Say how training ended (finished, failed or killed), and wait for the rest of the record.

    A number in `signals` cuts that off, now or later. Returns what was recorded: `run_id`,
    `tracking_uri`, `complete`, and `error` if not all is.
    """
    try:
        write_json(folder / files.ENDED, {"state": state, "reason": reason})
    except OSError as error:  # a full disk must not hide why training ended
        process.kill()
        process.wait()
        return {"complete": False, "error": f"{folder}: {error.strerror}"}
    found = wait(process, folder, tell, signals)
    if process.returncode not in (0, 3) and not signals:  # it died, which another need not
        found = wait(start(folder), folder, tell, signals)
    return found


def wait(
    process: subprocess.Popen[bytes], folder: Path, tell: Callable[[str], None],
    signals: Sequence[int] = (),
) -> dict[str, Any]:  # fmt: skip
    """The delivering process's last word, once it has ended; it is ended by a first signal."""
    patience = time.monotonic() + 3
    while process.poll() is None and not signals:
        if time.monotonic() > patience:
            cause = f" {found}, it is tried again" if (found := trouble(folder)) else ""
            tell(f"      recording to MLflow ...{cause}")
            patience = float("inf")
        time.sleep(0.05)
    if process.poll() is None:
        process.kill()
        process.wait()
        return {**recorded(folder), "complete": False, "error": "it was cut off by a signal"}
    return recorded(folder)


def recorded(folder: Path) -> dict[str, Any]:
    """The delivering process's last word."""
    try:
        found = files.read_json(folder / files.RECORDED)
    except (OSError, ValueError):
        return {"complete": False, "error": f"nothing is recorded: see {folder}/deliver.log"}
    return found


def trouble(folder: Path) -> str:
    """What keeps the delivery from going on at the moment, if anything."""
    return recorded(folder).get("error", "") if (folder / files.RECORDED).exists() else ""


def finish(folder: str | Path, signals: Sequence[int] = ()) -> dict[str, Any]:
    """Deliver what a run's folder holds and MLflow does not, unless `signals` cut that off.

    Raises RecordError when it cannot, and UsageError while a command trains the run.
    """
    place = Path(folder).resolve()
    if not (place / files.RECORD).exists():
        raise UsageError(f"{folder}: not the folder of a run (no record.json)")
    with files.locked(place):
        found = wait(start(place, ALONE), place, lambda _: None, signals)
    if not found.get("complete"):
        other = "another command goes on with this run, and records it"
        raise RecordError(f"{folder}: {found.get('error', other)}")
    return found
