"""What MLflow is told of a run besides its curve, written to the run's folder before training."""

from __future__ import annotations

import base64
import io
import json
import os
import platform
import socket
import subprocess
import uuid
from importlib.metadata import version

import pyarrow as pa

from pipeline import plugins
from pipeline.files.atomic import delete_temporaries
from pipeline.redact import redact
from pipeline.rundir import RunDir
from pipeline.rundir.records import ColumnFacts, DataFacts, Launcher, Record
from pipeline.tracking.names import params, tracking_uri
from pipeline.train import determinism
from pipeline.train.job import Job

PACKAGES = ("pipeline", "torch", "ray", "mlflow", "pyarrow", "numpy")


def write_record(run: RunDir, job: Job, modules: list[str]) -> None:
    """Write the record, and clear what commands before this one left of their end."""
    for path in (run.record, run.ended, run.recorded):  # of commands that were killed
        delete_temporaries(path)
    _build_record(run, job, modules).write(run.record)
    if run.recorded.exists():
        before = run.read_recorded()
        before.model_copy(update={"complete": False, "error": ""}).write(run.recorded)
    for path in (*run.tracebacks, run.ended, run.stop):
        path.unlink(missing_ok=True)
    run.spec.write_text(job.spec.dump(), encoding="utf-8")


def _build_record(run: RunDir, job: Job, modules: list[str]) -> Record:
    spec = job.spec
    before = run.read_recorded()
    launcher = Launcher(id=uuid.uuid4().hex, pid=os.getpid(), host=socket.gethostname())
    token = _choose_token(run)
    imports_sha256 = plugins.sources_sha256(modules) if modules else ""
    tags = {
        "pipeline.run": token,
        "pipeline.launcher": launcher.id,
        "pipeline.spec_digest": spec.digest,
        "pipeline.data_fingerprint": job.fingerprint,
        "pipeline.storage": str(run.path),
        "pipeline.versions": _describe_versions(),
        "pipeline.bits": json.dumps(determinism.fingerprint(spec)),
        "pipeline.bits_sha256": determinism.fingerprint_sha256(spec),
        **({"pipeline.imports": imports_sha256} if modules else {}),
        **_git(),
        **_ray_job(),
    }
    # the record of a resumed run stays where it began
    uri = before.tracking_uri if before.run_id else redact(tracking_uri(run.path.parent))
    return Record(
        name=run.name,
        job=spec.name,
        experiment=spec.tracking.experiment or spec.name,
        register_as=spec.tracking.register_as,
        tracking_uri=uri,
        params=params(spec),
        data=_describe_data(job),
        spec=spec.dump(),
        fields=[field.to_json() for field in job.fields],
        example=_encode(job.example),
        tags=tags,
        token=token,
        digest=spec.digest,
        imports_sha256=imports_sha256,
        modules=modules,
        num_workers=spec.workers.most,
        launcher=launcher,
        is_copied=spec.checkpoint.copy_to is not None,
    )


def _choose_token(run: RunDir) -> str:
    """What tells this run from all others, also after it is resumed."""
    try:
        record = run.read_record()
    except (OSError, ValueError):
        record = None
    return record.token if record else uuid.uuid4().hex


def _encode(table: pa.Table) -> str:
    """A small table as text."""
    content = io.BytesIO()
    with pa.ipc.new_file(content, table.schema) as writer:
        writer.write_table(table)
    return base64.b64encode(content.getvalue()).decode()


def _describe_data(job: Job) -> DataFacts:
    facts = job.facts
    return DataFacts(
        name=job.spec.name,
        fingerprint=job.fingerprint,
        files=facts.files,
        num_files=facts.num_files,
        rows=facts.rows,
        dropped=facts.dropped,
        columns={
            field.name: ColumnFacts(kind=field.kind, type=field.arrow_type, role=field.role)
            for field in job.fields
        },
        profile=facts.profile,
    )


def _describe_versions() -> str:
    versions = [f"{package} {version(package)}" for package in PACKAGES]
    return ", ".join([f"python {platform.python_version()}", *versions])


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


def _ray_job() -> dict[str, str]:
    """Submission id of the Ray job this command is the entry point of."""
    job_id = os.environ.get("RAY_JOB_SUBMISSION_ID", "")
    if not job_id:
        try:
            config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
            job_id = str(config.get("metadata", {}).get("job_submission_id", ""))
        except ValueError:
            pass
    return {"ray.job_id": job_id} if job_id else {}
