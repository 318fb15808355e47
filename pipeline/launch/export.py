"""Write a trained model as programs that need none of this code, checked on real rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline import plugins
from pipeline.errors import UsageError
from pipeline.launch.run import threads
from pipeline.launch.trained import load_trained


@dataclass(frozen=True)
class Export:
    """What `export` has written."""

    out: str
    files: list[str]
    distances: dict[str, float]
    """How far a program's numbers are from the model's at most, by file."""
    num_rows: int
    """Rows on which they were compared."""

    def summary(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {"state": "done", **asdict(self)}


def export(
    model: str,
    out: str | Path,
    files: Sequence[str] = (),
    *,
    storage: str | Path = "runs",
    imports: Sequence[str] = (),
) -> Export:
    """Write the model's programs and weights to the folder `out`.

    `model` is the folder of a finished run, its name in `storage`, or MLflow's address of a model
    that a run recorded. Programs are compared with it on the first rows of `files`, or, for a run,
    on a few of its training rows. Raises UsageError and DataError, before anything is written where
    the model cannot be exported.
    """
    from pipeline.inference.export import COLUMNS, WEIGHTS
    from pipeline.inference.export import export as write
    from pipeline.inference.files import first_rows

    folder = Path(out)
    if "://" in str(out) or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"--out: {out} is not a folder of this machine")
    plugins.load(list(imports))
    trained, _ = load_trained(model, Path(storage))
    if files:
        rows = first_rows(trained, files, Path.cwd())
    elif trained.example is not None:
        rows = trained.example
    else:
        raise UsageError(f"{model}: name files with rows, on which its programs can be checked")
    with threads(trained.job.workers.threads):
        distances = write(trained, rows, folder)
    return Export(str(folder), sorted([*distances, WEIGHTS, COLUMNS]), distances, len(rows))
