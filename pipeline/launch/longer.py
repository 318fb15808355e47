"""A finished run that goes on: the first steps of a longer job are taken from it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace

from pipeline.files.atomic import replacing, sync_folder
from pipeline.rundir import RunDir, checkpoint
from pipeline.rundir.records import Done, Manifest, Parent
from pipeline.spec import load
from pipeline.train import determinism
from pipeline.train.job import Job

LENGTH = ("training.epochs", "training.max_steps")
"""Keys that may differ: how long training takes."""


def obstacle(
    before: RunDir, job: Job, changed: list[str], get_state: Callable[[], None]
) -> str | None:
    """Why the job cannot go on from a finished run; empty if it can; None if it is another job.

    `changed` are the lines of what differs between them; `get_state` brings the newest checkpoint's
    state here, where it is elsewhere.
    """
    if not before.is_intact or not all(line.partition(":")[0] in LENGTH for line in changed):
        return None
    done = Done.read(before.done)
    shorter = replace(job, spec=load(before.spec))
    if job.num_steps <= done.steps:
        return None
    if done.steps != shorter.num_steps:
        return f"it ended early, at step {done.steps:,}: {done.ended_early}"
    if job.spec.training.average and job.spec.training.average.swa:
        return "its average begins at a share of all steps"
    if job.validation is not None and done.steps % job.steps_per_evaluation:
        return "its end is no time to evaluate in the longer one"
    for step in range(done.steps):
        if job.learning_rate_factor(step) != shorter.learning_rate_factor(step):
            return f"its schedule {job.spec.schedule.name} depends on how long training takes"
    get_state()
    if not checkpoint.newest(before, determinism.identity(shorter), done.steps)[0]:
        return "its checkpoints are not here"
    return ""


def go_on(run: RunDir, before: RunDir, job: Job) -> int:
    """Give a new run the curve and the newest checkpoint of the finished one; returns its step."""
    shorter = replace(job, spec=load(before.spec))
    step, _ = checkpoint.newest(before, determinism.identity(shorter))
    shutil.copyfile(before.journal, run.journal)
    saved = run.checkpoint(step)
    shutil.copytree(before.checkpoint(step), saved)
    manifest = Manifest.from_bytes((saved / checkpoint.MANIFEST).read_bytes())
    mine = manifest.model_copy(update={"identity": determinism.identity(job), "journal": ()})
    with replacing(saved / checkpoint.MANIFEST) as file:
        file.write(mine.to_bytes())
    sync_folder(run.path)
    Parent(name=before.name, run_id=before.read_recorded().run_id, step=step).write(run.parent)
    return step
