"""Which folder a command trains in: a new one, or that of the unfinished run that it resumes.

A job's runs stand below its `storage` as NAME-1, NAME-2 and so on; the last one counts. The same
spec, data and custom modules resume it; the second half of the spec may change in between.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

from pipeline import plugins
from pipeline.data.cache import make_folder
from pipeline.errors import UsageError
from pipeline.files.atomic import sync_folder
from pipeline.files.store import FAULTS, is_uri, reason
from pipeline.launch import longer
from pipeline.rundir import RunDir, checkpoint
from pipeline.rundir.backup import Backups
from pipeline.rundir.remote import copies
from pipeline.rundir.remote_command import CommandSide
from pipeline.spec import FIRST_HALF, OUTSIDE_DIGEST, JobSpec
from pipeline.tracking.names import environment_uri, params
from pipeline.train import determinism
from pipeline.train.job import Job

T = TypeVar("T")
MAX_CHANGES = 12  # shown in one message


class Runs:
    """The runs of one job, in its `storage` and in its backups."""

    def __init__(self, spec: JobSpec, name: str = "") -> None:
        """Raises UsageError for a `storage` or `checkpoint.copy_to` that is not a place."""
        self.storage = storage_of(spec)
        self.uri = spec.storage if is_uri(spec.storage) else None
        self.slug = slug_of(name or spec.name)
        copy_to = spec.checkpoint.copy_to
        self.backups = Backups(copy_to) if copy_to else None
        if self.uri:
            if copy_to:
                raise UsageError("checkpoint.copy_to: `storage` is an object store already")
            if not environment_uri():
                raise UsageError(
                    "storage: MLflow's database cannot be in an object store: set "
                    "MLFLOW_TRACKING_URI"
                )
            self.backups = Backups(self.uri, "storage")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Let one command at a time choose its folder; others wait."""
        try:
            self.storage.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.storage / f".{self.slug}.lock")
            lock.acquire()
        except OSError as error:
            raise UsageError(f"storage: {self.storage} cannot be used: {error.strerror}") from None
        try:
            yield
        finally:
            lock.release()

    def resume_or_create(
        self, job: Job, modules: list[str], fresh: bool, tell: Callable[[str], None]
    ) -> RunDir:
        """The last run's folder if this is the same job, else a new one.

        Raises UsageError when an unfinished run would be resumed as another job.
        """
        last = None if fresh else self.find_latest()
        if last is not None:
            remote = CommandSide.of(job.spec.storage, last)
            get_state = partial(self._with_store, remote.get_state) if remote else lambda: None
            changed = changes(last, job, modules, get_state)
            if remote:
                remote.drop_states()
            if not changed:
                return last
            if not last.is_finished:
                self._refuse_changed(last, changed)
                tell(f"note  {last.name} is left, as what it trains has changed: {changed[0]}")
            why = longer.obstacle(last, job, changed, get_state)
            if why:
                tell(f"note  {last.name} is shorter; this does not go on from it: {why}")
            if why == "":
                run = self.new()
                step = longer.go_on(run, last, job)
                if remote:
                    remote.drop_states()
                tell(f"note  {run.name} goes on from step {step} of {last.name}: the same curve")
                return run
        return self.new()

    def find_latest(self) -> RunDir | None:
        """The last run that has a record; one that only the backups have is copied back.

        Of one in an object store, this machine's copy is brought up to date.
        """
        numbered = {
            int(match[1]): RunDir(path)
            for path in self.storage.glob(f"{self.slug}-*")
            if (match := re.fullmatch(rf"{re.escape(self.slug)}-(\d+)", path.name))
            and RunDir(path).record.exists()
        }
        number = max(numbered, default=0)
        copied = self.backups.numbers(self.slug) if self.backups else []
        runs = [RunDir(self.storage / f"{self.slug}-{one}") for one in reversed(copied)]
        if self.uri:
            return next((run for run in runs if self._is_fetched(run)), None)
        if self.backups and runs and copied[-1] > number:
            run, store = runs[0], self.backups.of(runs[0].name).store
            run.path.mkdir(parents=True, exist_ok=True)
            if self._with_store(lambda: store.get(run.record.name, run.record)):
                return run
        return numbered.get(number)

    def _is_fetched(self, run: RunDir) -> bool:
        """Bring a run's copy on this machine to what the object store has; whether it has a run:
        a command may have been killed before there was a record."""
        remote = CommandSide.of(self.uri or "", run)
        if remote is None or not self._with_store(lambda: remote.store.has(run.record.name)):
            return False
        run.path.mkdir(parents=True, exist_ok=True)
        self._with_store(remote.fetch)
        self._with_store(remote.get_recorded)
        return True

    def new(self) -> RunDir:
        """A new folder with the next free number, which no backup has either."""
        number = max(self.backups.numbers(self.slug) if self.backups else [], default=0) + 1
        while True:
            path = self.storage / f"{self.slug}-{number}"
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                number += 1
            except OSError as error:
                raise UsageError(f"storage: {path} cannot be created: {error.strerror}") from None
            else:
                sync_folder(self.storage)
                return RunDir(path)

    def recover(self, run: RunDir, job: Job) -> list[str]:
        """Take from the run's backup what is newer than its folder; what is to be said of it."""
        if self.backups is None or self.uri:
            return []
        here, _ = checkpoint.newest(run, determinism.identity(job))
        backup = self.backups.of(run.name)
        there, skipped = self._with_store(lambda: backup.pull(run, here))
        if there or (run.is_intact and not here):
            return [*skipped, f"{run.name} comes back from its copy in {self.backups.shown}"]
        return skipped

    def back_up_record(self, run: RunDir) -> None:
        """Where runs have a backup, that has the record before anything else: it is ours now.

        Where they are in an object store, that has all that the workers are told.
        """
        if self.uri:
            self._with_store(CommandSide(self.uri, run).send)
        elif self.backups:
            store = self.backups.of(run.name).store
            self._with_store(lambda: store.put(run.record, run.record.name))

    def _with_store(self, work: Callable[[], T]) -> T:
        """Do it with what is elsewhere. Raises UsageError where that cannot be used."""
        assert self.backups is not None
        try:
            return work()
        except FAULTS as error:
            key, shown = self.backups.key, self.backups.shown
            raise UsageError(f"{key}: {shown}: {reason(error)}") from None

    def _refuse_changed(self, run: RunDir, changed: list[str]) -> None:
        """Raise UsageError when an unfinished run would be resumed as another job.

        A run without a checkpoint has nothing to lose, one that failed by itself is to be changed.
        """
        ended = run.read_ended()
        has_state = bool(run.saved_steps())
        if self.backups and not has_state:
            has_state = bool(self._with_store(self.backups.of(run.name).checkpoints))
        if not has_state or (ended and ended.state == "failed"):
            return
        more = [f"and {len(changed) - MAX_CHANGES} more"] if len(changed) > MAX_CHANGES else []
        lines = "\n  ".join([*changed[:MAX_CHANGES], *more])
        raise UsageError(
            f"{run.name} is not finished, and what it trains has changed:\n  {lines}\n"
            "  undo the change to resume it; another `name` keeps both; --fresh (fresh=True in "
            "Python) gives it up for a new run"
        )


def changes(
    run: RunDir, job: Job, modules: list[str], get_state: Callable[[], None] = lambda: None
) -> list[str]:
    """What is trained now and was not when the run began: one line each.

    `get_state` brings the newest checkpoint's state here, where it is elsewhere.
    """
    try:
        record = run.read_record()
    except ValueError:
        record = None
    if record is None:  # a checkpoint tells as well that this is the same job
        get_state()
        step, _ = checkpoint.newest(run, determinism.identity(job))
        return [] if step else [f"{run.record.name} is damaged: what it trained is not known"]
    before = record.params
    now = params(job.spec)
    lines = [
        f"{key}: {_show(before.get(key))} -> {_show(now.get(key))}"
        for key in sorted({*before, *now})
        if key.partition(".")[0] in FIRST_HALF
        and key not in OUTSIDE_DIGEST
        and before.get(key) != now.get(key)
    ]
    if not lines and record.digest != job.spec.digest:
        lines.append("the spec's first half")
    if not run.is_finished and (old := checkpoint.other_format(run)):
        lines.append(f"the version of pipeline: it reads no checkpoints of format {old}")
    if record.data.fingerprint != job.fingerprint:
        lines.append("the rows themselves (other fingerprint)")
    if record.imports_sha256 != plugins.sources_sha256(modules):
        names = ", ".join(plugins.changed(modules, run.imports))
        lines.append(f"the code of custom modules{f': {names}' if names else ''}")
    return lines


def storage_of(spec: JobSpec) -> Path:
    """Folder of the runs, or of their copies. A Ray job's own folder is deleted with it, so there
    it is below home."""
    if is_uri(spec.storage):
        return copies(make_folder(spec.cache), spec.storage, "runs")
    start = Path.home() if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ else Path.cwd()
    return (start / Path(spec.storage).expanduser()).resolve()


def slug_of(name: str) -> str:
    """The name as a folder's; if that took changes, with a mark of its own."""
    slug = "".join(c if c.isalnum() or c in "._-" else "-" for c in name)
    return slug if slug == name else f"{slug}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def _show(value: str | None) -> str:
    return "not given" if value in (None, "None") else str(value)
