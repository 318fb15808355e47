"""A trained model as programs that need none of this code: torch.export, ONNX, safetensors.

A program takes raw numbers in the columns' own units and codes in the place of categories, and
gives what is served: probabilities, rates, amounts. What it cannot hold, as the codes, stands
beside it in `columns.json`.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from pipeline.data.arrow import flat, plain
from pipeline.data.batch import Batch, Column, Ragged
from pipeline.data.columns import Category, Field, FloatType, Lists, column_errors
from pipeline.data.columns.numbers import FixedTensor, Number, Series, as_numbers, padded
from pipeline.errors import UsageError
from pipeline.files.atomic import replacing
from pipeline.inference.model import TrainedModel
from pipeline.losses.objective import Objective
from pipeline.tracebacks import describe

PROGRAM, ONNX, WEIGHTS, COLUMNS = "model.pt2", "model.onnx", "model.safetensors", "columns.json"
TOLERANCE = 1e-5
"""How far a program's numbers may be from the model's: relative, and absolute below 1."""
LENGTHS = "_lengths"
"""Ends the name of the input that says how long the lists of a column are."""
MAX_CHECKED = 1000

Columns = dict[str, Tensor]


class Exported(nn.Module):
    """The trained model from raw columns to what is served, without anything but torch."""

    def __init__(self, model: TrainedModel) -> None:
        super().__init__()
        self.objective: Objective = model.objective
        self.fields = model.inputs
        self.names = _output_names(model)
        self.kind = torch.float64 if model.float_dtype is np.float64 else torch.float32

    def forward(self, columns: Columns) -> Columns:
        return self.served({field.name: self._read(field, columns) for field in self.fields})

    def served(self, batch: Batch) -> Columns:
        """What is served for the rows of a batch, by the outputs' names."""
        predictions = self.objective.predict(batch)
        served = {}
        for index, term in enumerate(self.objective.terms):
            values = self.objective.served(index, predictions)
            served[self.names[index]] = term.target.in_units(term, values)
        return served

    def _read(self, field: Field, columns: Columns) -> Column:
        """A column as the model takes it."""
        values = columns[field.name]
        lengths = columns.get(f"{field.name}{LENGTHS}")
        if isinstance(field, Number | FixedTensor | Series):
            values = self._scaled(field, values)
        if lengths is None:
            return values
        return Ragged(Ragged(values, lengths).padded(0), lengths)

    def _scaled(self, field: Any, values: Tensor) -> Tensor:
        if field.fill is not None:
            values = torch.where(values.isnan(), values.new_tensor(field.fill), values)
        if field.log:
            values = values.log1p()
        mean, deviation = (values.new_tensor(part) for part in (field.mean, field.deviation))
        return ((values - mean) / deviation).to(self.kind)


def export(model: TrainedModel, rows: pa.Table, folder: Path) -> dict[str, float]:
    """Write the model's programs to the folder, each checked on the rows.

    They compute in float32 where training did in bfloat16. Returns by file how far its numbers are
    from the model's at most. Raises UsageError, with nothing written, for a model that torch cannot
    export, or whose program gives other numbers.
    """
    if not len(rows):
        raise UsageError("there is no row to check the programs on")
    rows = pa.concat_tables([rows, rows]).slice(0, MAX_CHECKED)  # one row alone is a special case
    if model.objective.precision == torch.bfloat16:
        model.objective.precision = torch.float32
    columns = _program_inputs(model, rows)
    wrapped = Exported(model).eval()
    with torch.no_grad():
        expected = wrapped.served(model.batch_of(rows))  # encoded as in training
    distances = {}
    with tempfile.TemporaryDirectory() as place:
        temporary = Path(place)
        program = _program(wrapped, columns, model)
        served = _run_program(program, temporary / PROGRAM, columns)
        distances[PROGRAM] = _distance(PROGRAM, served, expected)
        if find_spec("onnxscript"):
            arrays = {name: tensor.numpy() for name, tensor in columns.items()}
            _write_onnx(program, columns, list(expected), temporary / ONNX)
            served = dict(zip(expected, _run_onnx(temporary / ONNX, arrays), strict=True))
            distances[ONNX] = _distance(ONNX, served, expected)
        (temporary / WEIGHTS).write_bytes(_weights(model))
        about = json.dumps(_describe(model, columns, expected), indent=1, ensure_ascii=False)
        (temporary / COLUMNS).write_text(about, encoding="utf-8")
        folder.mkdir(parents=True, exist_ok=True)
        if ONNX not in distances:  # one that is there is of another model
            (folder / ONNX).unlink(missing_ok=True)
        for path in sorted(temporary.iterdir()):
            with replacing(folder / path.name) as file:
                file.write(path.read_bytes())
    return distances


def _output_names(model: TrainedModel) -> list[str]:
    """Labels of the terms, told apart from columns of that name."""
    inputs = {field.name for field in model.inputs}
    labels = [term.label for term in model.objective.terms]
    return [f"{label} (served)" if label in inputs else label for label in labels]


def _program(wrapped: Exported, columns: Columns, model: TrainedModel) -> Any:
    rows = torch.export.Dim("rows")
    shapes = {}
    for name, tensor in columns.items():
        field = next((one for one in model.inputs if one.name == name), None)
        is_list = field is not None and field.is_list and tensor.dim() > 1
        auto = torch.export.Dim.AUTO
        shapes[name] = {0: rows, 1: auto} if is_list else {0: rows}
    try:
        with _quiet():
            return torch.export.export(wrapped, (columns,), dynamic_shapes=(shapes,), strict=False)
    except Exception as error:  # a user's model can hold anything
        text = f"model {model.job.model.name}: torch.export cannot follow it: {describe(error)}"
        raise UsageError(text) from error


def _run_program(program: Any, path: Path, columns: Columns) -> Columns:
    """What the program gives, once it is written and read back."""
    try:
        torch.export.save(program, path)
        loaded: Any = torch.export.load(path).module()
        with torch.no_grad():
            served: Columns = loaded(columns)
    except Exception as error:
        raise UsageError(f"{path.name}: cannot be run: {describe(error)}") from error
    return served


def _write_onnx(program: Any, columns: Columns, outputs: list[str], path: Path) -> None:
    try:
        with _quiet():
            written = torch.onnx.export(
                program, input_names=list(columns), output_names=outputs, dynamo=True, verbose=False
            )
        assert written is not None
        path.write_bytes(written.model_proto.SerializeToString())
    except Exception as error:
        raise UsageError(f"{path.name}: torch.onnx cannot write it: {describe(error)}") from error


def _run_onnx(path: Path, columns: Mapping[str, Any]) -> list[Any]:
    """What the file gives: by ONNX Runtime if it is there, else by ONNX's own reference."""
    try:
        if find_spec("onnxruntime"):
            import onnxruntime

            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            read = [one.name for one in session.get_inputs()]
            return list(session.run(None, {name: columns[name] for name in read}))
        from onnx.reference import ReferenceEvaluator

        reference = ReferenceEvaluator(str(path))
        return list(reference.run(None, {name: columns[name] for name in reference.input_names}))
    except Exception as error:  # an operation that nobody has written
        raise UsageError(f"{path.name}: cannot be run: {describe(error)}") from error


def _weights(model: TrainedModel) -> bytes:
    from safetensors.torch import save

    state = model.objective.model.state_dict()
    return save({name: tensor.detach().clone().contiguous() for name, tensor in state.items()})


def _program_inputs(model: TrainedModel, rows: pa.Table) -> Columns:
    """The rows as a program takes them."""
    given = {name: rows[name] for name in rows.column_names}
    columns: Columns = {}
    for field in model.inputs:
        cells = plain(model.input_of(given, field, len(rows)))
        with column_errors(f"column {field.name!r}"):
            columns |= _program_input(field, field.from_cells(cells), model.float_dtype)
    return columns


def _program_input(field: Field, cells: Any, float_dtype: FloatType) -> Columns:
    """One column of cells: numbers as they are, all else as codes or encoded."""
    field.check_readable(cells)
    if isinstance(field, Number):
        return {field.name: torch.from_numpy(np.array(as_numbers(cells)))}
    if isinstance(field, FixedTensor):
        numbers = np.array(as_numbers(flat(cells)[0]))
        return {field.name: torch.from_numpy(numbers).reshape(len(cells), *field.shape)}
    encoded = field.encode(cells, field.dtype(float_dtype))
    if not isinstance(encoded, Lists):
        kind = np.dtype(np.int64) if field.num_codes else encoded.dtype
        return {field.name: torch.from_numpy(encoded.astype(kind))}
    starts = np.cumsum(encoded.lengths) - encoded.lengths
    if isinstance(field, Series):
        numbers = np.array(as_numbers(flat(cells)[0]))
        column: Column = padded(numbers, starts, encoded.lengths, np.dtype(np.float64))
    else:
        column = field.gather(encoded.values, starts, encoded.lengths)
    if isinstance(column, Ragged):
        return {field.name: column.values, f"{field.name}{LENGTHS}": column.lengths}
    return {field.name: column}


def _distance(name: str, given: Mapping[str, Any], expected: Columns) -> float:
    """The largest distance: relative, absolute below 1. Raises UsageError beyond the tolerance."""
    worst = 0.0
    for label, wanted in expected.items():
        numbers = torch.as_tensor(given[label]).double()
        apart = (numbers - wanted.double()).abs() / wanted.double().abs().clamp(min=1)
        worst = max(worst, float(apart.max())) if apart.numel() else worst
        if not bool((apart <= TOLERANCE).all()):
            problem = f"gives other numbers than the model for {label}, by {worst:g}"
            raise UsageError(f"{name}: {problem}")
    return worst


def _describe(model: TrainedModel, columns: Columns, expected: Columns) -> dict[str, Any]:
    """What a program's inputs and outputs mean."""
    outputs = {}
    for index, label in enumerate(expected):
        term = model.objective.with_threshold(index)
        at = "times" if term.loss.target == "survival" else "levels"
        classes = [field.vocabulary for field in term.targets if field.vocabulary]
        outputs[label] = {
            "targets": [field.name for field in term.targets],
            "shape": ["rows", *expected[label].shape[1:]],
            "columns": list(term.target.decode(term, expected[label][:1].cpu())),
            **({"classes": [list(map(str, names)) for names in classes]} if classes else {}),
            **({at: list(term.loss.levels)} if term.loss.levels else {}),
            **({"threshold": term.threshold.tolist()} if term.threshold is not None else {}),
        }
    inputs = {field.name: _describe_input(field, columns[field.name]) for field in model.inputs}
    return {"inputs": inputs, "outputs": outputs}


def _describe_input(field: Field, column: Tensor) -> dict[str, Any]:
    shape = ["rows", *field.shape]
    if isinstance(field, Number | FixedTensor):
        missing = "" if field.fill is None else f"; NaN where missing, read as {field.fill:g}"
        return {"type": "float64", "shape": shape, "holds": f"the column's own numbers{missing}"}
    if isinstance(field, Category):
        last = f", {field.num_codes - 1} if missing" if field.has_missing else ""
        values = [str(value) for value in field.vocabulary or ()]
        held = f"1 + place among `values`, 0 if it is none of them{last}"
        return {"type": "int64", "shape": shape, "holds": held, "values": values}
    if field.is_list and not field.shape:
        kind = "float64" if isinstance(field, Series) else "int64"
        held = f"lists, padded; `{field.name}{LENGTHS}` int64 [rows] says how long each is"
        words = [str(value) for value in field.vocabulary or ()]
        about: dict[str, Any] = {"type": kind, "shape": ["rows", "longest"], "holds": held}
        return about | ({"values": words} if words else {})
    own = {key: value for key, value in field.to_json().items() if key not in ("name", "role")}
    kind = str(column.dtype).removeprefix("torch.")
    return {"type": kind, "shape": shape, "holds": f"an encoded {field.kind}", **own}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the notes of torch's exporters, of which none can be acted upon."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
