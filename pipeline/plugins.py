"""Custom losses, models and metrics: modules that the user names, carried to every worker."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.metadata
import importlib.util
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.errors import UsageError

GROUP = "pipeline.plugins"
NOT_CUSTOM = {"__main__", "pipeline"}
_seen: dict[str, float] = {}
"""Imported modules and when their files were written."""


def load(imports: list[str] | tuple[str, ...]) -> list[str]:
    """Import installed plugins and the given modules or files; returns the modules' names.

    Raises UsageError naming what could not be imported.
    """
    for point in importlib.metadata.entry_points(group=GROUP):
        point.load()
    return [_load(name) for name in imports]


def _load(name: str) -> str:
    path = Path(name)
    is_file = name.endswith(".py")
    if is_file and not path.is_file():
        raise UsageError(f"--import {name}: no such file")
    module, folder = (path.stem, path.resolve().parent) if is_file else (name, Path.cwd())
    if not all(part.isidentifier() for part in module.split(".")):
        raise UsageError(f"--import {name}: {module!r} cannot be a module's name")
    if str(folder) in sys.path:
        sys.path.remove(str(folder))
    sys.path.insert(0, str(folder))  # before copies that a loaded model has brought along
    try:
        loaded = importlib.import_module(module)
        written = _write_time(loaded)
        if _seen.setdefault(module, written) != written:  # edited since, in a notebook's process
            importlib.reload(loaded)
            _seen[module] = written
    except UsageError:
        raise
    except Exception as error:  # the user's module can fail in any way
        raise UsageError(f"--import {name}: {type(error).__name__}: {error}") from error
    if is_file and not _same(Path(loaded.__file__ or ""), path):
        raise UsageError(
            f"--import {name}: the name {module!r} is taken by {loaded.__file__}; rename the file"
        )
    return module


def _same(one: Path, other: Path) -> bool:
    """Whether both are one file, or copies of it."""
    return one.resolve() == other.resolve() or (
        one.is_file() and one.read_bytes() == other.read_bytes()
    )


def _write_time(module: ModuleType) -> float:
    return Path(module.__file__).stat().st_mtime if module.__file__ else 0.0


def homes(builds: list[Callable[..., Any]], imports: list[str]) -> list[str]:
    """The modules to carry: those imported, and those that hold the given custom components.

    Raises UsageError for a component written in a script or notebook cell, which neither workers
    nor the served model could import.
    """
    installed = {
        point.module.partition(".")[0] for point in importlib.metadata.entry_points(group=GROUP)
    }
    modules = list(imports)
    for build in builds:
        module = build.__module__
        top = module.partition(".")[0]
        if module == "__main__":
            raise UsageError(
                f"{build.__qualname__} is written in the script itself, where workers and the "
                "served model cannot import it: put it in a file and pass imports=[that file]"
            )
        if top != "pipeline" and top not in installed and module not in modules:
            modules.append(module)
    return modules


def carry(modules: list[str], folder: Path) -> None:
    """Copy the modules' source into `folder`, from where workers import them.

    What they import from their own folder goes with them.
    """
    for source in _sources(modules):
        folder.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", ".*")
            shutil.copytree(source, folder / source.name, dirs_exist_ok=True, ignore=ignored)
        else:
            shutil.copy2(source, folder / source.name)


def files_of(modules: Sequence[str], only_python: bool = False) -> dict[str, Path]:
    """The files that `carry` copies, by where it puts them."""
    pattern = "*.py" if only_python else "*"
    return {
        str(path.relative_to(source.parent)): path
        for source in _sources(modules)
        for path in _files(source, pattern)
    }


def origins(modules: list[str], folder: Path) -> dict[str, str]:
    """The files and packages that `carry` puts into `folder`, and where the user has them."""
    return {str(folder / source.name): str(source) for source in _sources(modules)}


def sources_sha256(modules: list[str]) -> str:
    """SHA-256 over what `carry` copies: custom losses and models are part of what is trained."""
    digest = hashlib.sha256()
    for source in _sources(modules):
        for path in _files(source):
            digest.update(str(path.relative_to(source.parent)).encode() + path.read_bytes())
    return digest.hexdigest() if modules else ""


def changed(modules: list[str], folder: Path) -> list[str]:
    """Files that `carry` copied to `folder` and that are other ones now, new, or gone."""
    files = files_of(modules, only_python=True)
    now = {place: path.read_bytes() for place, path in files.items()}
    before = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.py")}
    return sorted(name for name in {*now, *before} if now.get(name) != before.get(name))


def _sources(modules: Sequence[str]) -> list[Path]:
    """Files and packages of the modules, and of what they import from their own folder."""
    sources = {_source(sys.modules[name.partition(".")[0]]) for name in modules}
    left = [source for source in sources if "site-packages" not in source.parts]
    while left:
        source = left.pop()
        for name in _imports_of(source):
            sibling = _beside(source.parent, name)
            if sibling is not None and sibling not in sources:
                sources.add(sibling)
                left.append(sibling)
    return sorted(sources)


def _files(source: Path, pattern: str = "*.py") -> list[Path]:
    """Files of a module or package, without hidden folders, as a notebook's copies."""
    if not source.is_dir():
        return [source]
    paths = [path for path in sorted(source.rglob(pattern)) if path.is_file()]
    hidden = (".", "__pycache__")
    return [p for p in paths if not any(q.startswith(hidden) for q in p.relative_to(source).parts)]


def _imports_of(source: Path) -> set[str]:
    """First parts of all names that a module's source imports, anywhere in it."""
    names = set()
    for path in _files(source):
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # nobody can have imported it
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
            elif isinstance(node, ast.Call) and node.args:  # importlib.import_module("name")
                called = ast.unparse(node.func)
                first = node.args[0]
                is_import = called.rpartition(".")[2] in ("import_module", "__import__")
                if is_import and isinstance(first, ast.Constant) and isinstance(first.value, str):
                    names.add(first.value.partition(".")[0])
    return names - NOT_CUSTOM - {""}


def _beside(folder: Path, name: str) -> Path | None:
    """The module or package of that name in the folder, if Python would import it from there."""
    if name in sys.modules:
        source = _source(sys.modules[name])
        return source if source.parent == folder else None
    if name in sys.stdlib_module_names:
        return None
    if (folder / name / "__init__.py").is_file():
        return folder / name
    return folder / f"{name}.py" if (folder / f"{name}.py").is_file() else None


def _source(module: ModuleType) -> Path:
    if getattr(module, "__path__", None):
        return Path(next(iter(module.__path__)))
    return Path(getattr(module, "__file__", None) or "")


def receive(modules: list[str], folder: Path) -> None:
    """Import the modules that `carry` put into `folder`, unless they are imported already."""
    load([])
    missing = [name for name in modules if name not in sys.modules]
    if missing and str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    for name in missing:
        importlib.import_module(name)
