"""Which folder a command trains in: a new one, or that of the unfinished run it goes on with.

A job's runs stand below its `storage` as NAME-1, NAME-2 and so on; the last one counts. The same
spec, data and own modules go on where it is; the second half of the spec may change in between.
"""

from __future__ import annotations

import fcntl
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import plugins
from pipeline.errors import UsageError
from pipeline.spec import FIRST_HALF, OUTSIDE_DIGEST, JobSpec
from pipeline.track import delivery
from pipeline.train import files

if TYPE_CHECKING:
    from pipeline.train.job import Job
    from pipeline.train.mirror import Mirror

MOST_CHANGES = 12  # shown in one message


def copies_of(spec: JobSpec) -> Mirror | None:
    """Where the job's runs are copied to, if they are. Raises UsageError for no place."""
    if spec.checkpoint.copy_to is None:
        return None
    from pipeline.train.mirror import Mirror

    return Mirror(spec.checkpoint.copy_to)


def latest(storage: Path, name: str, mirror: Mirror | None = None) -> Path | None:
    """The job's last run that has a record, if any; one that only `mirror` has is copied back."""
    numbered = [
        (int(found.group(1)), place)
        for place in storage.glob(f"{_slug(name)}-*")
        if (found := re.fullmatch(rf"{re.escape(_slug(name))}-(\d+)", place.name))
        and (place / files.RECORD).exists()
    ]
    number, place = max(numbered, default=(0, None))
    copied = mirror.runs(_slug(name))[-1:] if mirror else []
    if mirror and copied and copied[0] > number:
        folder = storage / f"{_slug(name)}-{copied[0]}"
        folder.mkdir(parents=True, exist_ok=True)
        if mirror.of(folder.name).get(files.RECORD, folder / files.RECORD):
            return folder
    return place


def new(storage: Path, name: str, mirror: Mirror | None = None) -> Path:
    """A new folder with the next free number, which no copy has either."""
    number = max(mirror.runs(_slug(name)) if mirror else [], default=0) + 1
    while True:
        folder = storage / f"{_slug(name)}-{number}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        except OSError as error:
            raise UsageError(f"storage: {folder} cannot be made: {error.strerror}") from None
        else:
            files.folder_to_disk(storage)
            return folder


def _slug(name: str) -> str:
    """The name as a folder's; if that took changes, with a mark of its own."""
    made = "".join(c if c.isalnum() or c in "._-" else "-" for c in name)
    return made if made == name else f"{made}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def recovered(folder: Path, job: Job) -> list[str]:
    """Take from the run's copy what is newer than this folder; what is to be said of it."""
    from pipeline.train import checkpoint, determinism

    mirror = copies_of(job.spec)
    if mirror is None:
        return []
    here, _ = checkpoint.newest(folder, determinism.identity(job))
    there, passed = mirror.of(folder.name).pull(folder, here)
    if there or (files.is_done(folder) and not here):
        return [*passed, f"{folder.name} comes back from its copy in {mirror.shown}"]
    return passed


def changes(folder: Path, job: Job, modules: list[str]) -> list[str]:
    """What is trained now and was not when the run in `folder` began: one line each."""
    from pipeline.train import checkpoint, determinism

    try:
        record = files.read_json(folder / files.RECORD)
    except ValueError:  # a checkpoint tells as well that this is the same job
        step, _ = checkpoint.newest(folder, determinism.identity(job))
        return [] if step else [f"{files.RECORD} is damaged: what it trained is not known"]
    before, now = record["params"], delivery.params(job.spec)
    found = [
        f"{key}: {_given(before.get(key))} -> {_given(now.get(key))}"
        for key in sorted({*before, *now})
        if key.partition(".")[0] in FIRST_HALF
        and key not in OUTSIDE_DIGEST
        and before.get(key) != now.get(key)
    ]
    tags = record["tags"]
    if not found and tags["pipeline.spec_digest"] != job.spec.digest:
        found.append("the spec's first half")
    if tags["pipeline.data_fingerprint"] != job.fingerprint:
        found.append("the rows themselves (other fingerprint)")
    if tags.get("pipeline.imports", "") != plugins.sources_sha256(modules):
        names = ", ".join(plugins.changed(modules, folder / "imports"))
        found.append(f"the code of own modules{f': {names}' if names else ''}")
    return found


def _given(value: str | None) -> str:
    return "not given" if value in (None, "None") else str(value)


def refuse_changed(folder: Path, changed: list[str], mirror: Mirror | None) -> None:
    """Raise UsageError when an unfinished run would go on as another job.

    A run without a checkpoint has nothing to lose, one that failed by itself is to be changed.
    """
    try:
        state = files.read_json(folder / files.ENDED)["state"]
    except (OSError, ValueError):
        state = "killed"
    has_state = any(folder.glob(files.CHECKPOINTS))
    has_state = has_state or bool(mirror and mirror.of(folder.name).steps())
    if changed and has_state and state != "failed":
        shown = changed[:MOST_CHANGES]
        more = [f"and {len(changed) - MOST_CHANGES} more"] if len(changed) > MOST_CHANGES else []
        lines = "\n  ".join([*shown, *more])
        raise UsageError(
            f"{folder.name} is not finished, and what it trains has changed:\n  {lines}\n"
            "  undo the change to go on with it; another `name` keeps both; --fresh (fresh=True in "
            "Python) gives it up for a new run"
        )


@contextmanager
def choosing(storage: Path, name: str) -> Iterator[None]:
    """Let one command at a time choose its folder; others wait."""
    try:
        storage.mkdir(parents=True, exist_ok=True)
        lock = (storage / f".{_slug(name)}.lock").open("a")
    except OSError as error:
        raise UsageError(f"storage: {storage} cannot be used: {error.strerror}") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
