"""What MLflow is told of a run besides its curve, written to the run's folder before training."""

from __future__ import annotations

import base64
import io
import os
import socket
import uuid
from collections.abc import Iterable

import pyarrow as pa

from pipeline import plugins
from pipeline.data.columns import Field
from pipeline.files.atomic import delete_temporaries
from pipeline.redact import redact
from pipeline.rundir import RunDir
from pipeline.rundir.records import ColumnFacts, DataFacts, Launcher, Parent, Record
from pipeline.rundir.remote_command import CommandSide
from pipeline.tracking.names import PARENT, params, tracking_uri
from pipeline.tracking.source import command, source_tags
from pipeline.train import determinism
from pipeline.train.job import Job
from pipeline.train.term_metrics import choose_metrics, choose_primary


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
    before, remote = run.read_recorded(), CommandSide.of(spec.storage, run)
    launcher = Launcher(id=uuid.uuid4().hex, pid=os.getpid(), host=socket.gethostname())
    token = _choose_token(run)
    imports_sha256 = plugins.sources_sha256(modules) if modules else ""
    tags = {
        "pipeline.run": token,
        "pipeline.launcher": launcher.id,
        "pipeline.spec_digest": spec.digest,
        "pipeline.data_fingerprint": job.fingerprint,
        "pipeline.storage": remote.store.shown if remote else str(run.path),
        "pipeline.bits_sha256": determinism.fingerprint_sha256(spec),
        **_parent_tags(run),
        **({"pipeline.imports": imports_sha256} if modules else {}),
        **source_tags(),
    }
    primary, is_lower_better = _choose_primary_metric(job)
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
        versions=determinism.versions(),
        token=token,
        digest=spec.digest,
        imports_sha256=imports_sha256,
        modules=modules,
        num_workers=spec.workers.most,
        num_steps=job.num_steps,
        primary_metric=primary,
        is_lower_better=is_lower_better,
        command=command(),
        launcher=launcher,
        is_copied=bool(remote or spec.checkpoint.copy_to),
    )


def _parent_tags(run: RunDir) -> dict[str, str]:
    """The run above this one on MLflow's page: the one that it goes on from."""
    if not run.parent.exists():
        return {}
    parent = Parent.read(run.parent)
    known = {PARENT: parent.run_id} if parent.run_id else {}
    return {**known, "pipeline.goes_on_from": f"step {parent.step} of {parent.name}"}


def _choose_primary_metric(job: Job) -> tuple[str, bool]:
    """The metric that runs of the job are compared by, and whether it is better when lower."""
    if job.validation is None:
        return "train/loss", True
    metrics = choose_metrics(job.terms, job.spec.metrics, job.spec.data.weighs_metrics)
    name, is_lower_better = choose_primary(metrics, job.spec.training.best_by)
    return f"validation/{name}", is_lower_better


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


def column_facts(fields: Iterable[Field]) -> dict[str, ColumnFacts]:
    """What MLflow is told of each column."""
    return {
        field.name: ColumnFacts(kind=field.kind, type=field.arrow_type, role=field.role)
        for field in fields
    }


def _describe_data(job: Job) -> DataFacts:
    facts = job.facts
    return DataFacts(
        name=job.spec.name,
        fingerprint=job.fingerprint,
        files=facts.files,
        num_files=facts.num_files,
        rows=facts.rows,
        digests=facts.digests,
        dropped=facts.dropped,
        columns=column_facts(job.fields),
        profile=facts.profile,
    )
