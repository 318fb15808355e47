"""Where the files are that `data` names: paths, folders, globs, URIs, samples; nothing is read."""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.data import samples
from pipeline.errors import DataError
from pipeline.redact import redact
from pipeline.spec.data import Data

FORMATS = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "ipc",
    ".ipc": "ipc",
    ".feather": "feather",
    ".csv": "csv",
}


@dataclass(frozen=True)
class FileSet:
    """Where one name of the spec leads: files of one format, or a sample."""

    name: str
    paths: list[str]
    filesystem: Any = None
    format: str = "sample"

    def below(self, path: str) -> str:
        """A file's path below the folder that the name leads to, or its name."""
        folder = self.name.partition("://")[2].partition("?")[0] or self.name
        folders = [folder, os.path.abspath(folder)] if "://" not in self.name else [folder]
        start = next((one for one in folders if path.startswith(f"{one.rstrip('/')}/")), None)
        return path[len(start.rstrip("/")) + 1 :] if start else path.rpartition("/")[2]

    @property
    def identities(self) -> list[str]:
        """What each file is called on its file system, without links; or the sample."""
        if self.format == "sample":
            return [self.name]
        if isinstance(self.filesystem, pafs.LocalFileSystem):
            return [os.path.realpath(path) for path in self.paths]
        return [f"{self.filesystem.type_name}://{path}" for path in self.paths]

    def stamp(self) -> list[Any]:
        """What tells at little cost whether the rows are the same: sizes and modification times."""
        if self.format == "sample":
            return [self.name, samples.version_of(self.name)]
        if isinstance(self.filesystem, pafs.LocalFileSystem):
            known = [(path, os.stat(path)) for path in self.paths]
            return [[p, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for p, s in known]
        return [[i.path, i.size, i.mtime_ns] for i in self.filesystem.get_file_info(self.paths)]


@dataclass(frozen=True)
class DataFiles:
    """All files that a spec's `data` names; nothing of them has been read."""

    data: Data
    places: dict[str, list[FileSet]]
    """Those of each split that has files of its own; `train` first."""

    def stamp(self) -> list[Any]:
        """Changes when a file does."""
        return [[place.stamp() for place in places] for places in self.places.values()]

    def changed(self, stamp: list[Any]) -> list[str]:
        """Files that are not what they were when the `stamp` was taken."""
        changes = []
        before = [place for places in stamp for place in places]
        for place, old in zip(chain(*self.places.values()), before, strict=True):
            if place.format == "sample":
                continue
            for path, was in zip(place.paths, old, strict=True):
                try:
                    is_same = replace(place, paths=[path]).stamp() == [was]
                except OSError:
                    is_same = False
                if not is_same:
                    changes.append(path)
        return changes

    @property
    def files(self) -> list[str]:
        """Path or name of each, without secrets."""
        places = chain(*self.places.values())
        return [path for p in places for path in p.paths or [p.name]]


def locate(data: Data, base: Path) -> DataFiles:
    """Find what `data` names; relative paths start at `base`. Raises DataError with the key."""
    named = {"train": data.train, "validation": data.validation, "test": data.test}
    places = {
        split: locate_names(f"data.{split}", names, base)
        for split, names in named.items()
        if isinstance(names, str | list)
    }
    seen: dict[str, str] = {}
    for split, of_split in places.items():
        key = f"data.{split}"
        for path in (path for place in of_split for path in place.identities):
            if path in seen:
                raise DataError(
                    f"{key}: {path} is named a second time, {seen[path]} has it already"
                )
            seen[path] = key
    return DataFiles(data, places)


def locate_names(key: str, uris: str | list[str], base: Path) -> list[FileSet]:
    """Where each path, glob, URI or sample leads. Raises DataError that begins with `key`."""
    names = [uris] if isinstance(uris, str) else uris
    if len(names) > 1 and any(name.startswith("sample:") for name in names):
        raise DataError(f"{key}: a sample stands alone, found {names}")
    return [_locate_one(key, name, base) for name in names]


def _locate_one(key: str, name: str, base: Path) -> FileSet:
    shown = redact(name)
    if not name.strip():
        raise DataError(f"{key}: an empty path")
    if name.startswith("sample:"):
        samples.refuse_unknown(key, name)
        return FileSet(name, [])
    try:
        if "://" in name:
            filesystem, path = pafs.FileSystem.from_uri(name)
            paths = _files(filesystem, path)
        else:
            filesystem = pafs.LocalFileSystem()
            pattern = str(Path(glob.escape(str(base))) / Path(name).expanduser())
            literal = base / Path(name).expanduser()
            is_glob = glob.has_magic(name) and not literal.exists()
            matches = sorted(glob.glob(pattern, recursive=True)) if is_glob else [str(literal)]
            inside = [file for path in matches for file in _files(filesystem, path)]
            paths = list({os.path.realpath(file): file for file in inside}.values())  # links
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{key}: {shown} cannot be opened: {plainly(error, name)}") from None
    if not paths:
        is_local = "://" not in name
        if is_local and (base / Path(name).expanduser()).is_dir():
            raise DataError(f"{key}: the folder {shown} holds no file")
        where = f" (looked in {base.resolve()})" if is_local else ""
        raise DataError(f"{key}: no such file or folder: {shown}{where}")
    by_format: dict[str | None, str] = {}
    for path in paths:
        by_format.setdefault(_format(path), path)
    if unknown := by_format.get(None):
        raise DataError(
            f"{key}: expected files that end in {', '.join(sorted(FORMATS))}, found {unknown}; "
            "in folders, files whose names begin with . or _ are skipped"
        )
    if len(by_format) > 1:
        raise DataError(
            f"{key}: {shown} holds files of several formats: {', '.join(by_format.values())}"
        )
    return FileSet(name, paths, filesystem, str(next(iter(by_format))))


def _files(filesystem: Any, path: str) -> list[str]:
    info = filesystem.get_file_info(path)
    if info.type == pafs.FileType.Directory:
        inside = filesystem.get_file_info(pafs.FileSelector(path, recursive=True))
        return sorted(
            item.path
            for item in inside
            if item.type == pafs.FileType.File and not _is_hidden(item.path, path)
        )
    return [path] if info.type == pafs.FileType.File else []


def _is_hidden(path: str, folder: str) -> bool:
    """Whether a file, or a folder on the way to it, is one that tools keep for themselves."""
    return any(part.startswith((".", "_")) for part in Path(path).relative_to(folder).parts)


def _format(path: str) -> str | None:
    name = path.lower().removesuffix(".gz").removesuffix(".zst")
    return next((kind for end, kind in FORMATS.items() if name.endswith(end)), None)


def plainly(error: Exception, names: str | list[str]) -> str:
    """Arrow's message without the secrets of the URIs it repeats, and without its C++ lines."""
    text = str(error).partition("\n")[0]
    for name in [names] if isinstance(names, str) else names:
        text = text.replace(name, redact(name))
    return text
