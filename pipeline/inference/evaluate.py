"""How good a trained model is on rows of files: losses, metrics and predictions."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.data.columns import column_errors, encode
from pipeline.data.dataset import Dataset, Writer, open_dataset
from pipeline.data.fingerprint import digest_rows
from pipeline.data.formats import datasets
from pipeline.data.locate import locate_names
from pipeline.data.missing import InvalidRows, kept_rows
from pipeline.data.origins import Origins, OriginWriter
from pipeline.data.reader import Source, select_columns
from pipeline.errors import DataError
from pipeline.inference.files import KEY
from pipeline.inference.model import TrainedModel
from pipeline.losses.terms import check_targets
from pipeline.rundir.held_out import HeldOut
from pipeline.rundir.records import Numbers
from pipeline.train.baselines import choose_baselines
from pipeline.train.evaluate import evaluate, rows_at_once
from pipeline.train.predictions import held_out
from pipeline.train.term_metrics import choose_metrics

TRIAL_ROWS = 64
"""On which custom losses are tried."""


@dataclass(frozen=True)
class FileScores:
    """What a model gets on the rows of files."""

    files: list[str]
    num_rows: int
    num_dropped: int
    """Rows that `data.missing` drops."""
    digest: str
    """SHA-256 of the rows, as runs have it of their splits."""
    metrics: Numbers
    baselines: Numbers
    """The metrics that a constant prediction has; a median is not known without training rows."""
    notes: list[str]
    held_out: HeldOut | None
    """Predictions of the rows, or of a sample of them."""


def evaluate_files(
    model: TrainedModel,
    names: Sequence[str],
    base: Path,
    report: Callable[[int], None] = lambda _: None,
) -> FileScores:
    """Losses and the job's metrics over all rows, as for the test rows of its run.

    Rows are converted to a temporary folder first; `report` is told how many. Raises DataError
    naming file, column and row.
    """
    job = model.job
    source, files = _open(model, names, base)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        conversion = _Conversion(model, source)
        dataset = conversion.write(folder / "rows", report)
        conversion.origins.write(folder / "origins.npz")
        origins = Origins.read(folder / "origins.npz")
        objective = model.objective
        objective.resolve_denominators(dataset.gather(np.arange(min(TRIAL_ROWS, len(dataset)))))
        targets = [field.name for field in model.fields if field.is_target]
        for batch in dataset.parts(targets) if targets else ():
            check_targets(objective.terms, batch)
        metrics = choose_metrics(objective.terms, job.metrics, job.data.weighs_metrics)
        found = evaluate(
            objective,
            dataset,
            np.arange(len(dataset)),
            rows_at_once(objective, job.training),
            metrics,
            model.device,
            choose_baselines(objective.terms, metrics, None),
            keep=True,
        )
    kept = held_out(objective, found.kept, 0, origins) if found.kept else None
    return FileScores(
        files,
        len(dataset),
        conversion.num_dropped,
        conversion.digest.hexdigest(),
        found.values,
        found.baselines,
        found.notes,
        kept,
    )


def _open(model: TrainedModel, names: Sequence[str], base: Path) -> tuple[Source, list[str]]:
    """The files with all columns that the job used of its training rows."""
    places = locate_names(KEY, list(names), base)
    own = {
        "inputs": [field.name for field in model.inputs],
        "validation": None,
        "test": None,
        "sampling": None,  # which says how training rows are drawn
    }
    data = model.job.data.model_copy(update=own)
    dataset = datasets({KEY: places}, data.categorical)[KEY]
    files = [path for place in places for path in place.paths or [place.name]]
    return select_columns(data, KEY, dataset, ", ".join(names), len(files) > 1), files


def _stored(model: TrainedModel, source: Source) -> set[str]:
    """Names of fields that are made of the source's columns."""
    shifted = {new for new, column in model.job.data.shift.items() if column in source.wanted}
    return {*source.wanted, *shifted}


class _Conversion:
    """Rows of files as a dataset, with what tells them from others."""

    def __init__(self, model: TrainedModel, source: Source) -> None:
        self.model, self.source = model, source
        self.fields = [field for field in model.fields if field.name in _stored(model, source)]
        self.origins = OriginWriter()
        self.digest = hashlib.sha256()
        self.num_dropped = 0

    def write(self, folder: Path, report: Callable[[int], None]) -> Dataset:
        """The dataset, whose files are below `folder`."""
        fields, kind = self.fields, self.model.float_dtype
        writer = Writer(folder, fields, kind)
        for table, row_name in self._tables():
            shift = self.model.job.data.shift
            writer.append(encode(fields, table, shift, kind, row_name), len(table))
            report(len(table))
        writer.close()
        if not writer.num_rows:
            raise DataError(f"{KEY}: no rows in {self.source.shown}")
        return open_dataset(folder, fields, kind)

    def _tables(self) -> Iterator[tuple[pa.Table, Callable[[int], str]]]:
        """The rows of each block that are not dropped, and their names."""
        data, invalid = self.model.job.data, InvalidRows()
        by_name = {field.name: field for field in self.fields}
        for block in self.source.blocks():
            kept = kept_rows(data, self.source, by_name, block, invalid)
            invalid.refuse()
            table = block.table.take(pa.array(kept))
            digest_rows(table, self.digest)
            self.origins.add(block, kept)
            self.num_dropped += len(block.table) - len(table)
            row_name = block.row_namer(kept)
            for field in self.model.inputs:
                with column_errors(self.source.where(field.name), row_name):
                    column = field.from_cells(table[field.name].combine_chunks())
                table = table.set_column(table.column_names.index(field.name), field.name, column)
            yield table, row_name
