"""From a spec's columns to the statistics of their training rows, and from these to fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow as pa

from pipeline.data.arrow import is_text
from pipeline.data.columns import (
    Category,
    Date,
    Field,
    FixedTensor,
    Image,
    Labels,
    Number,
    Reading,
    Role,
    Series,
    Statistics,
    Text,
    Tokens,
    column_errors,
)
from pipeline.data.missing import InvalidRows, kept_rows, with_missing
from pipeline.data.reader import Source, open_table
from pipeline.errors import DataError
from pipeline.spec.data import Data


def bind(
    data: Data, source: Source, readings: Mapping[str, Reading], base: Path
) -> dict[str, Statistics]:
    """Statistics without a row yet for each input, target and weight, by the name of its field.

    Raises DataError with every column of which nothing can be made, and with what else is wrong in
    the first rows.
    """
    types = {field.name: field.type for field in source.schema}
    binders: dict[str, Callable[[], Statistics]] = {
        name: partial(_bind_input, data, name, types[name], base, source) for name in source.inputs
    }
    for name in data.targets:
        stored = data.shift.get(name, name)
        reading = readings.get(name, Reading())
        binders[name] = partial(_bind_target, data, name, stored, reading, types[stored], source)
    for name in data.weight_columns:
        binders[name] = partial(_bind_weight, data, name, types[name], source)
    bound: dict[str, Statistics] = {}
    faults = []
    for name, binder in binders.items():
        try:
            bound[name] = binder()
        except DataError as fault:
            faults.append(str(fault))
    if faults:
        invalid = InvalidRows()
        block = next(source.blocks(), None)
        if block is None:
            raise DataError(f"{source.key}: no rows in {source.shown}")
        kept_rows(data, source, unfitted_fields(bound), block, invalid)
        raise DataError("\n  ".join(dict.fromkeys([*faults, *invalid.lines])))
    return bound


def fit_table(data: Data, table: pa.Table, readings: Mapping[str, Reading]) -> list[Field]:
    """Fields of a table in memory, all of whose rows are for training."""
    source = open_table(data, table)
    bound = bind(data, source, readings, Path())
    invalid = InvalidRows()
    fields = unfitted_fields(bound)
    for block in source.blocks():
        kept_rows(data, source, fields, block, invalid)
        invalid.refuse()
        for name, statistics in bound.items():
            stored = data.shift.get(name, name)
            with column_errors(source.where(stored), block.row_name):
                statistics.observe(block.table[stored])
    return [fit(data, name, statistics, source) for name, statistics in bound.items()]


def fit(data: Data, name: str, statistics: Statistics, source: Source) -> Field:
    """The column, once all training rows are seen. Raises DataError for what cannot be fitted."""
    with column_errors(source.where(data.shift.get(name, name))):
        return statistics.fit()


def unfitted_fields(bound: Mapping[str, Statistics]) -> dict[str, Field]:
    """The fields as they are before they have seen a row."""
    return {name: statistics.field for name, statistics in bound.items()}


def _bind_input(
    data: Data, name: str, arrow_type: pa.DataType, base: Path, source: Source
) -> Statistics:
    where = source.where(name)
    field = _declared_input(data, name, arrow_type, base) or choose_field(name, arrow_type, where)
    if name in data.categorical:
        if not field.is_single:
            raise DataError(f"{where} is {arrow_type}: only single values can be categorical")
        field = Category(name, str(arrow_type))
    is_scaled = isinstance(data.scale, dict) and name in data.scale
    if is_scaled and not field.is_amount:
        raise DataError(
            f"data.scale.{name}: {where} is {arrow_type}, read as {field.kind}, which has no scale"
        )
    return with_missing(field, data, name, where, arrow_type).statistics(data.scale_of(name))


def _declared_input(data: Data, name: str, arrow_type: pa.DataType, base: Path) -> Field | None:
    """The field of a column that the spec says how to read."""
    types = pa.types
    if name in data.dates:
        if not (types.is_timestamp(arrow_type) or types.is_date(arrow_type)):
            raise DataError(f"data.dates: column {name!r} is {arrow_type}, expected dates or times")
        with column_errors(f"data.dates.{name}"):
            return Date.from_parts(name, arrow_type, data.parts_of(name))
    if name in data.images:
        if not (types.is_binary(arrow_type) or types.is_large_binary(arrow_type)):
            raise DataError(
                f"data.images: column {name!r} is {arrow_type}, expected encoded images"
            )
        image = data.images[name]
        shape = tuple(image.size) if image.mode == "L" else (3, *image.size)
        return Image(name, str(arrow_type), shape=shape)
    if name in data.tokenizers:
        if not is_text(arrow_type):
            raise DataError(f"data.tokenizers: column {name!r} is {arrow_type}, expected text")
        return Text.from_file(
            name, str(arrow_type), base / Path(data.tokenizers[name]).expanduser()
        )
    return None


def _bind_target(
    data: Data, name: str, stored: str, reading: Reading, arrow_type: pa.DataType, source: Source
) -> Statistics:
    where = source.where(stored) if name == stored else f"data.target: column {stored!r}"
    positive = data.positive.get(name)
    if positive is not None and reading.as_classes:
        problem = "is for losses of yes and no; the losses read it as classes"
        raise DataError(f"data.positive.{name}: {problem}")
    if positive is not None:
        reading = replace(reading, as_classes=True)
    field = choose_field(name, arrow_type, where, reading)
    if positive is not None:
        if not isinstance(field, Category):
            raise DataError(f"data.positive.{name}: {where} holds no single classes")
        field = replace(field, positive=positive)
    if name != stored and not isinstance(field, Tokens):
        raise DataError(
            f"data.shift.{name}: {where} is {arrow_type}; lists of tokens can be shifted"
        )
    if reading.as_float64 and isinstance(field, Number):
        field = replace(field, is_float64=True)
    scale = data.target_scale_of(name) if reading.as_amounts else "none"
    unless_binary = not reading.is_declared and not isinstance(data.target_scale, dict)
    field = with_missing(field, data, stored, where, arrow_type)
    return field.statistics(scale, unless_binary)


def _bind_weight(data: Data, name: str, arrow_type: pa.DataType, source: Source) -> Statistics:
    where = source.where(name)
    if not isinstance(choose_field(name, arrow_type, where), Number):
        raise DataError(f"{where} is {arrow_type}, expected numbers")
    role: Role = "exposure" if name == data.exposure else "weight"
    field = Number(name, str(arrow_type), role)
    return with_missing(field, data, name, where, arrow_type).statistics()


def choose_field(
    name: str, arrow_type: pa.DataType, where: str, reading: Reading | None = None
) -> Field:
    """The field of a column of this type; as a target, where the losses' `reading` is given.

    Raises DataError for types that nothing is made of.
    """
    types = pa.types
    value_type = arrow_type
    text = str(arrow_type)
    shape: tuple[int, ...] = ()
    as_classes = reading is not None and reading.as_classes
    ignored = reading.ignored if reading is not None and reading.as_classes else None
    role: Role = "input" if reading is None else "target"
    if isinstance(value_type, pa.FixedShapeTensorType):
        value_type, shape = value_type.value_type, tuple(value_type.shape)
    elif isinstance(value_type, pa.BaseExtensionType):
        value_type = value_type.storage_type
    while types.is_fixed_size_list(value_type):
        value_type, shape = value_type.value_type, (*shape, value_type.list_size)
    is_number = types.is_floating(value_type) or types.is_integer(value_type)
    if shape:
        if not is_number:
            raise DataError(f"{where} holds fixed-size lists of {value_type}: expected numbers")
        if as_classes:
            return Labels(name, text, role, shape, ignored=ignored)
        return FixedTensor(name, text, role, shape)
    if types.is_list(value_type) or types.is_large_list(value_type):
        inner = value_type.value_type
        if types.is_floating(inner):
            return Series(name, text, role)
        if types.is_integer(inner):
            return Tokens(name, text, role, ignored=ignored)
        if types.is_string(inner) or types.is_large_string(inner):
            return Tokens(name, text, role, vocabulary=(), ignored=ignored)
        raise DataError(f"{where} holds lists of {inner}: expected numbers or text")
    if types.is_dictionary(value_type):
        choose_field(name, value_type.value_type, where)
        return Category(name, text, role, ignored=ignored)
    if types.is_boolean(value_type) or is_text(value_type):
        return Category(name, text, role, ignored=ignored)
    if is_number or types.is_decimal(value_type):
        if as_classes:
            return Category(name, text, role, ignored=ignored)
        return Number(name, text, role)
    raise DataError(_unreadable_type(value_type, where))


def _unreadable_type(arrow_type: pa.DataType, where: str) -> str:
    types = pa.types
    if types.is_null(arrow_type):
        return f"{where} holds no value in any row"
    if types.is_temporal(arrow_type):
        return (
            f"{where} is {arrow_type}: dates and times are read when data.dates names their "
            "column, as days elapsed and the phases of the year, the week and the day"
        )
    if types.is_binary(arrow_type) or types.is_large_binary(arrow_type):
        return f"{where} is {arrow_type}: encoded images are read when data.images names it"
    return f"{where} is {arrow_type}: expected numbers, text, booleans or lists of them"
