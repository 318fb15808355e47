"""What travels to a cluster: the job's file, custom modules, and the local files that it names."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline import plugins
from pipeline.data.locate import locate_names
from pipeline.errors import UsageError
from pipeline.files.atomic import sha256
from pipeline.launch.trained import is_recorded
from pipeline.redact import redact
from pipeline.spec import JobSpec

MOST_BYTES = 95 * 2**20
"""Ray's dashboard refuses packages from 100 MiB on."""
JOB_FOLDER = "job"
"""The job's file, and the files that it names, stand below it as they stand here."""
SOURCE = "source.json"
"""Who submitted the job, from which code."""
MAX_NAMED = 5


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


def _named(spec: JobSpec, base: Path) -> tuple[list[Path], dict[str, str]]:
    """Files here that the spec names by relative paths; and all other names, by their keys."""
    data, files = spec.data, list[Path]()
    left_out: dict[str, str] = {}
    for key in ("train", "validation", "test"):
        names = getattr(data, key)
        for name in [names] if isinstance(names, str) else names if isinstance(names, list) else []:
            if name.startswith("sample:"):
                continue
            if _is_the_clusters(name):
                known = left_out.get(f"data.{key}")
                left_out[f"data.{key}"] = ", ".join(filter(None, [known, redact(name)]))
                continue
            for place in locate_names(f"data.{key}", name, base):
                files += [Path(os.path.abspath(file)) for file in place.paths]
    for column, name in data.tokenizers.items():
        if _is_the_clusters(name):
            left_out[f"data.tokenizers.{column}"] = redact(name)
        else:
            files.append(Path(os.path.abspath(base / name)))
    weights = spec.model.init_from.weights if spec.model.init_from else ""
    if is_recorded(weights) or _is_the_clusters(weights):
        left_out["model.init_from"] = redact(weights)
    elif weights and not (base / weights).exists():
        left_out["model.init_from"] = weights  # a run in the storage
    elif weights and (base / weights).is_dir():
        folder = Path(os.path.abspath(base / weights))
        files += [file for file in sorted(folder.iterdir()) if file.is_file()]
    elif weights:
        files.append(Path(os.path.abspath(base / weights)))
    if gone := [file for file in files if not file.is_file()]:
        raise UsageError(f"{gone[0]}: no such file")
    return files, left_out


def _climbed(spec: JobSpec, base: Path) -> list[Path]:
    """The highest folders that relative names lead through: `../../a/b` needs two above `base`."""
    data = spec.data
    names = [n for key in (data.train, data.validation, data.test) if isinstance(key, str | list)
             for n in ([key] if isinstance(key, str) else key)]  # fmt: skip
    names += [*data.tokenizers.values()]
    names += [spec.model.init_from.weights] if spec.model.init_from else []
    highest = []
    for name in names:
        if name.startswith("sample:") or _is_the_clusters(name):
            continue
        here = base
        for part in Path(name).parts:
            here = here.parent if part == ".." else here / part
            highest.append(here.parent if here == base else here)
    return [folder for folder in highest if base.is_relative_to(folder)]


def _is_the_clusters(name: str) -> bool:
    """Whether a name means a place that the cluster is to know: a URI, or an absolute path."""
    return "://" in name or Path(name).is_absolute() or name.startswith("~")


def entrypoint(
    package: Package, overrides: Sequence[str], imports: Sequence[str], fresh: bool
) -> str:
    """The command that trains the job, in the package's folder."""
    words = ["python", "-m", "pipeline", "run", package.job, "--json"]
    for text in overrides:
        if redact(text) != text:
            raise UsageError(
                f"--set {redact(text)}: a password would stand in the cluster's list of jobs; put "
                "it into the environment of its nodes"
            )
        words += ["--set", text]
    for name in imports:
        words += ["--import", Path(name).name if name.endswith(".py") else name]
    return shlex.join([*words, *(["--fresh"] if fresh else [])])
