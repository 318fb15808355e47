"""Trained models by name: the folder of a finished run, or what MLflow has of one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from pipeline.errors import UsageError
from pipeline.files.store import is_uri
from pipeline.redact import redact
from pipeline.rundir import RunDir

if TYPE_CHECKING:
    from pipeline.inference.model import TrainedModel

SCHEMES = ("models:/", "runs:/")


def is_recorded(source: str) -> bool:
    """Whether it is a model's address in MLflow."""
    return source.startswith(SCHEMES)


def folder_of(source: str, storage: Path) -> Path | None:
    """The folder of a run by its path, its name in `storage`, or its URI in an object store.

    That is copied to this machine first. Raises UsageError, whose text follows the source.
    """
    if is_uri(source):
        from pipeline.data.cache import make_folder
        from pipeline.rundir.remote_command import fetched
        from pipeline.spec import Cache

        return fetched(source, make_folder(Cache())).path
    return next((path for path in (Path(source), storage / source) if path.is_dir()), None)


def run_of(folder: Path) -> RunDir:
    """The finished run of a folder. Raises UsageError, whose text follows the folder's name."""
    run = RunDir(folder.resolve())
    if not run.record.exists():
        raise UsageError("is not the folder of a run (no record.json)")
    if not run.is_intact:
        raise UsageError(f"is not finished: {run.damage() or 'it has no result'}")
    return run


@dataclass(frozen=True)
class Home:
    """Where MLflow has a model; empty where it has none."""

    tracking_uri: str
    model_id: str


def load_trained(source: str, storage: Path) -> tuple[TrainedModel, Home]:
    """The model of a run, by its folder or its name in `storage`, or by MLflow's address.

    Raises UsageError for anything else.
    """
    from pipeline.inference.model import TrainedModel

    try:
        if is_recorded(source):
            from pipeline.tracking.model import downloaded
            from pipeline.tracking.names import tracking_uri

            uri = tracking_uri(storage.resolve())
            with downloaded(source, uri) as artifacts:
                about = yaml.safe_load((artifacts.parent / "MLmodel").read_text())
                return TrainedModel.of_artifacts(artifacts), Home(uri, about.get("model_id") or "")
        folder = folder_of(source, storage)
        if folder is None:
            raise UsageError(f"is not the folder of a run, nor a run in {storage}")
        run = run_of(folder)
        recorded = run.read_recorded()
        return TrainedModel.of_run(run), Home(recorded.tracking_uri, recorded.model_id)
    except UsageError as error:
        raise UsageError(f"{redact(source)} {error}") from error.__cause__
