"""Predict files with a trained model: here, or on Ray workers, each file by one of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline import plugins
from pipeline.errors import StoppedError, UsageError
from pipeline.launch.run import Tell, threads
from pipeline.launch.trained import load_trained


@dataclass(frozen=True)
class Predictions:
    """What `predict` has made."""

    out: Path
    files: list[Path]
    """One for each file, those of an earlier command included."""
    num_rows: int
    """Rows predicted by this command."""
    seconds: float
    columns: list[str]

    def summary(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "state": "done", "out": str(self.out), "files": [str(path) for path in self.files],
            "rows": self.num_rows, "seconds": round(self.seconds, 3), "columns": self.columns,
        }  # fmt: skip


def predict(
    model: str,
    files: Sequence[str],
    out: str | Path,
    *,
    keep: Sequence[str] | None = None,
    workers: int = 1,
    gpu: bool = False,
    fresh: bool = False,
    storage: str | Path = "runs",
    imports: Sequence[str] = (),
    live: Tell = lambda _: None,
) -> Predictions:
    """Write a Parquet file of predictions to `out` for each of the `files`.

    `model` is the folder of a finished run, its name in `storage`, or MLflow's address of a model
    that a run recorded; `files` are paths, globs, URIs or samples. Rows stand in the order of the
    input: first the columns to `keep`, or all that the model neither reads nor predicts, then the
    predictions. Files that are there already are left, unless `fresh`. Raises UsageError and
    DataError before anything is written, unless a row is at fault.
    """
    from pipeline.inference.files import pending, plan
    from pipeline.launch.signals import refuse_stopped, signals_raise

    folder = Path(out).resolve()
    if "://" in str(out):
        raise UsageError(f"--out: {out} is not a folder of this machine")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out: {out} is a file, not a folder")
    plugins.load(list(imports))
    source = str(Path(model).resolve()) if Path(model).is_dir() else model
    begin = partial(_load, source, Path(storage).absolute(), gpu)
    trained = begin()
    made = plan(trained, files, Path.cwd(), folder, keep)
    left = pending(made, fresh)
    folder.mkdir(parents=True, exist_ok=True)
    started, num_rows = time.monotonic(), 0

    def report(rows: int) -> None:
        nonlocal num_rows
        num_rows += rows
        rate = num_rows / max(time.monotonic() - started, 1e-9)
        live(f"predicted {num_rows:,} rows of {len(left)} files, {rate:,.0f} rows/s")

    num_done = 0
    try:
        with signals_raise():
            if workers == 1:
                for task in left:
                    _predict(trained, task, made, report)
                    num_done += 1
            else:
                from pipeline.launch.ray_trainer import each_on_workers

                on = {"num": min(workers, len(left) or 1), "min": None, "max": None, "gpu": gpu}
                settings = trained.job.workers.model_copy(update=on)
                spec = trained.job.model_copy(update={"workers": settings})
                work = partial(_predict, plan=made)
                for rows in each_on_workers(spec, begin, work, left):
                    report(rows)
                    num_done += 1
            refuse_stopped()
    except StoppedError as error:
        where = f"; {num_done} of {len(left)} files are done, the same command does the others"
        raise StoppedError(error.number, where) from error
    return Predictions(
        folder,
        [task.output for task in made.tasks],
        num_rows,
        time.monotonic() - started,
        made.schema.names,
    )


def _load(model: str, storage: Path, gpu: bool) -> Any:
    """The model on the device of this process. Raises UsageError where that has no GPU."""
    import torch

    trained, _ = load_trained(model, storage)
    if gpu and not torch.cuda.is_available():
        raise UsageError("--gpu: there is no GPU that torch can use")
    return trained.to(torch.device("cuda" if gpu else "cpu"))


def _predict(
    trained: Any, task: Any, plan: Any, report: Callable[[int], None] = lambda _: None
) -> int:
    """One file, with as many threads as in training, here and on a Ray worker."""
    from pipeline.inference.files import predict_file

    with threads(trained.job.workers.threads):
        return predict_file(trained, task, plan, report)
