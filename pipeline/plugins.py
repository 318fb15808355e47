"""Own losses, models and metrics: modules that the operator names, carried to every worker."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

from pipeline.errors import UsageError

GROUP = "pipeline.plugins"


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
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        loaded = importlib.import_module(module)
    except UsageError:
        raise
    except Exception as error:  # the user's module can fail in any way
        raise UsageError(f"--import {name}: {type(error).__name__}: {error}") from error
    if is_file and Path(loaded.__file__ or "").resolve() != path.resolve():
        raise UsageError(
            f"--import {name}: the name {module!r} is taken by {loaded.__file__}; rename the file"
        )
    return module


def carry(modules: list[str], folder: Path) -> None:
    """Copy the modules' source into `folder`, from where workers import them."""
    for name in modules:
        top = sys.modules[name.partition(".")[0]]
        place = _source(top)
        folder.mkdir(parents=True, exist_ok=True)
        if place.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", ".*")
            shutil.copytree(place, folder / place.name, dirs_exist_ok=True, ignore=ignored)
        else:
            shutil.copy2(place, folder / place.name)


def _source(module: ModuleType) -> Path:
    if getattr(module, "__path__", None):
        return Path(next(iter(module.__path__)))
    return Path(module.__file__ or "")


def receive(modules: list[str], folder: Path) -> None:
    """Import the modules that `carry` put into `folder`, unless they are imported already."""
    load([])
    if modules and str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    for name in modules:
        importlib.import_module(name)
