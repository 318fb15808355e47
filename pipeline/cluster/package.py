"""What travels to a cluster: the job's file, custom modules, and the local files that it names."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline import plugins
from pipeline.data.locate import locate_names
from pipeline.errors import UsageError
from pipeline.files.atomic import sha256
from pipeline.launch.trained import is_recorded
from pipeline.redact import holds_secret, redact
from pipeline.spec import JobSpec

MOST_BYTES = 95 * 2**20
"""Ray's dashboard refuses packages from 100 MiB on."""
JOB_FOLDER = "job"
"""The job's file, and the files that it names, stand below it as they stand here."""
SOURCE = "source.json"
"""Who submitted the job, from which code."""
MAX_NAMED = 5
NO_SECRETS = (
    "a password would be seen by all who may use the cluster; put it into the environment of its "
    "nodes"
)


@dataclass(frozen=True)
class Package:
    """Files to be sent, by their place in the package."""

    files: dict[str, Path]
    job: str
    """The place of the job's file."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Names in the spec that the cluster has to know itself, by key."""

    @property
    def num_bytes(self) -> int:
        """Of all files, before they are compressed."""
        return sum(path.stat().st_size for path in self.files.values())

    @property
    def sha256(self) -> str:
        """Of places and contents, without the job's file."""
        others = {place: sha256(path) for place, path in self.files.items() if place != self.job}
        return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()

    def write(self, folder: Path, source: dict[str, str]) -> None:
        """Copy all of it to a folder, with the `source`."""
        for place, path in self.files.items():
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / place)
        (folder / SOURCE).write_text(json.dumps(source))


def pack(path: Path, spec: JobSpec, modules: Sequence[str]) -> Package:
    """What the job of this file needs. Raises UsageError for more than the cluster takes."""
    base = path.resolve().parent
    named, left_out = _named(spec, base)
    highest = [base, *(file.parent for file in named), *_climbed(spec, base)]
    start = Path(os.path.commonpath(highest))
    files = {f"{JOB_FOLDER}/{file.relative_to(start)}": file for file in named}
    _refuse_secrets(path)
    job = f"{JOB_FOLDER}/{path.resolve().relative_to(start)}"
    files = {job: path.resolve(), **files, **plugins.files_of(modules)}
    package = Package(files, job, left_out)
    if package.num_bytes > MOST_BYTES:
        largest = sorted(files.values(), key=lambda file: -file.stat().st_size)[:MAX_NAMED]
        sizes = "".join(f"\n  {file.stat().st_size / 2**20:8.1f} MiB  {file}" for file in largest)
        raise UsageError(
            f"the job names {package.num_bytes / 2**20:.0f} MiB of local files; a cluster takes "
            f"{MOST_BYTES / 2**20:.0f}:{sizes}\n  put them where its nodes can read them, on a "
            "shared disk or in an object store, and name them in the spec by absolute path or URI"
        )
    return package


def _refuse_secrets(job: Path) -> None:
    """Raise UsageError for a job's file with a password: the cluster shows it to its users."""
    for number, line in enumerate(job.read_text(encoding="utf-8").splitlines(), 1):
        if holds_secret(line):
            raise UsageError(f"{job.name}, line {number}: {NO_SECRETS}")


def _named(spec: JobSpec, base: Path) -> tuple[list[Path], dict[str, str]]:
    """Files here that the spec names by relative paths; and all other names, by their keys."""
    files: list[Path] = []
    left_out: dict[str, list[str]] = {}
    for key, name in _names(spec):
        found = [] if _is_the_clusters(name) else _found(key, name, base)
        if found:
            files += [Path(os.path.abspath(file)) for file in found]
        else:
            left_out.setdefault(key, []).append(redact(name))
    if gone := [file for file in files if not file.is_file()]:
        raise UsageError(f"{gone[0]}: no such file")
    return files, {key: ", ".join(names) for key, names in left_out.items()}


def _names(spec: JobSpec) -> Iterator[tuple[str, str]]:
    """Each name of files in the spec, after its key."""
    for key in ("train", "validation", "test"):
        names = getattr(spec.data, key)
        listed = [names] if isinstance(names, str) else names if isinstance(names, list) else []
        yield from ((f"data.{key}", name) for name in listed if not name.startswith("sample:"))
    for column, name in spec.data.tokenizers.items():
        yield f"data.tokenizers.{column}", name
    if spec.model.init_from:
        yield "model.init_from", spec.model.init_from.weights


def _found(key: str, name: str, base: Path) -> list[Path]:
    """The files of a relative name; none for weights of a run that the cluster's storage has."""
    if key == "model.init_from":
        place = base / name
        if place.is_dir():
            return [file for file in sorted(place.iterdir()) if file.is_file()]
        return [place] if place.exists() else []
    if key.startswith("data.tokenizers."):
        return [base / name]
    return [Path(file) for place in locate_names(key, name, base) for file in place.paths]


def _climbed(spec: JobSpec, base: Path) -> list[Path]:
    """The folders above `base` that relative names lead through: `../../a/b` needs two of them."""
    above = []
    for _, name in _names(spec):
        here = base
        for part in () if _is_the_clusters(name) else Path(name).parts:
            here = here.parent if part == ".." else here / part
            above.append(here)
    return [folder for folder in above if base.is_relative_to(folder)]


def _is_the_clusters(name: str) -> bool:
    """Whether a name means a place that the cluster is to know: a URI, or an absolute path."""
    if is_recorded(name) or "://" in name or name.startswith("~"):
        return True
    return Path(name).is_absolute()


def entrypoint(
    package: Package, overrides: Sequence[str], imports: Sequence[str], fresh: bool
) -> str:
    """The command that trains the job, in the package's folder."""
    words = ["python", "-m", "pipeline", "run", package.job, "--json"]
    for text in overrides:
        if holds_secret(text):
            raise UsageError(f"--set {redact(text)}: {NO_SECRETS}")
        words += ["--set", text]
    for name in imports:
        words += ["--import", Path(name).name if name.endswith(".py") else name]
    return shlex.join([*words, *(["--fresh"] if fresh else [])])
