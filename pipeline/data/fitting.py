"""From a spec's columns to their fits, and from these to fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pyarrow as pa

from pipeline.data import columns
from pipeline.data.arrow import kind_of
from pipeline.data.columns import Field, Reading
from pipeline.data.fits import (
    Categories,
    ClassNumbers,
    Dates,
    Fit,
    Images,
    Known,
    Numbers,
    Weights,
    is_named,
)
from pipeline.data.policy import Faults, kept, with_policy
from pipeline.data.source import Source, in_memory
from pipeline.dataspec import Data, Scale
from pipeline.errors import DataError

NUMERIC = ("number", "tensor", "series")


def fits(data: Data, source: Source, readings: Mapping[str, Reading], base: Path) -> dict[str, Fit]:
    """An empty fit for each input, target and weight, by the name of its field.

    Raises DataError with every column of which nothing can be made, and with what else is wrong in
    the first rows.
    """
    kinds = {field.name: field.type for field in source.schema}
    makers: dict[str, Callable[[], Fit]] = {
        name: partial(_of_input, data, name, kinds[name], base, source) for name in source.inputs
    }
    for name in data.targets:
        stored = data.shift.get(name, name)
        reading = readings.get(name, Reading())
        makers[name] = partial(_of_target, data, name, stored, reading, kinds[stored], source)
    if data.sample_weight is not None:
        name = data.sample_weight.column
        makers[name] = partial(_of_weight, data, name, kinds[name], source)
    made: dict[str, Fit] = {}
    faults = []
    for name, make in makers.items():
        try:
            made[name] = make()
        except DataError as fault:
            faults.append(str(fault))
    if faults:
        odd = Faults()
        block = next(source.blocks(), None)
        if block is None:
            raise DataError(f"{source.key}: no rows in {source.shown}")
        kept(data, source, raw(made), block, odd)
        raise DataError("\n  ".join(dict.fromkeys([*faults, *odd.lines])))
    return made


def fitted(data: Data, table: pa.Table, readings: Mapping[str, Reading]) -> list[Field]:
    """Fields of a table in memory, all of whose rows are for training."""
    source = in_memory(data, table)
    made, faults = fits(data, source, readings, Path()), Faults()
    for block in source.blocks():
        kept(data, source, raw(made), block, faults)
        faults.refuse()
        for name, fit in made.items():
            fit.add(block.table[data.shift.get(name, name)], block.named)
    return [fit.field() for fit in made.values()]


def raw(made: Mapping[str, Fit]) -> dict[str, Field]:
    """The fields as they are before they have seen a row."""
    return {name: fit.made for name, fit in made.items()}


def _of_input(data: Data, name: str, kind: pa.DataType, base: Path, source: Source) -> Fit:
    where, types = source.where(name), pa.types
    if name in data.dates:
        if not (types.is_timestamp(kind) or types.is_date(kind)):
            raise DataError(f"data.dates: column {name!r} is {kind}, expected dates or times")
        parts = tuple(p for p in data.parts_of(name) if p != "day" or types.is_timestamp(kind))
        if not data.parts_of(name):
            raise DataError(f"data.dates.{name}: no parts; take elapsed, year, week or day")
        if not parts:
            raise DataError(f"data.dates.{name}: column is {kind}, with no time of day in it")
        size = sum(1 if part == "elapsed" else 2 for part in parts)
        made = Field(name, "date", str(kind), shape=(size,), parts=parts)
        return Dates(with_policy(made, data, name, where))
    if name in data.images:
        if not (types.is_binary(kind) or types.is_large_binary(kind)):
            raise DataError(f"data.images: column {name!r} is {kind}, expected encoded images")
        image = data.images[name]
        shape = tuple(image.size) if image.mode == "L" else (3, *image.size)
        made = Field(name, "image", str(kind), shape=shape)
        return Images(with_policy(made, data, name, where), where)
    if name in data.tokenizers:
        if not is_named(kind) or types.is_boolean(kind):
            raise DataError(f"data.tokenizers: column {name!r} is {kind}, expected text")
        content = _tokenizer(name, base / Path(data.tokenizers[name]).expanduser())
        number = max(columns.tokenizer_of(content).get_vocab().values(), default=0) + 1
        made = Field(name, "tokens", str(kind), num_tokens=number, tokenizer=content)
        return Known(with_policy(made, data, name, where))
    read, shape = kind_of(kind, where)
    if name in data.categorical:
        if read not in columns.SINGLE:
            raise DataError(f"{where} is {kind}: only single values can be categorical")
        read = "category"
    if isinstance(data.scale, dict) and name in data.scale and read not in NUMERIC:
        raise DataError(f"data.scale.{name}: {where} is {kind}, read as {read}, which has no scale")
    made = with_policy(Field(name, read, str(kind), shape=shape), data, name, where, kind)
    return _fit(made, data.scale_of(name), where, kind)


def _tokenizer(column: str, path: Path) -> str:
    """The file's content, once it is known to be a tokenizer's."""
    where = f"data.tokenizers.{column}: {path}"
    try:
        content = path.read_text(encoding="utf-8")
        columns.tokenizer_of(content)
    except OSError as error:
        raise DataError(f"{where} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{where} is no tokenizer.json: {error}") from None
    return content


def _of_target(
    data: Data, name: str, stored: str, reading: Reading, kind: pa.DataType, source: Source
) -> Fit:
    where = source.where(stored) if name == stored else f"data.target: column {stored!r}"
    read, shape = kind_of(kind, where)
    if reading.as_classes:
        read = {"number": "category", "tensor": "labels"}.get(read, read)  # type: ignore[assignment]
    ignored = reading.ignored if reading.as_classes else None
    made = Field(name, read, str(kind), is_target=True, shape=shape, ignored=ignored)
    scale = data.target_scale_of(name) if reading.as_amounts else "none"
    unless_binary = not reading.is_declared and not isinstance(data.target_scale, dict)
    return _fit(with_policy(made, data, stored, where, kind), scale, where, kind, unless_binary)


def _of_weight(data: Data, name: str, kind: pa.DataType, source: Source) -> Fit:
    where = source.where(name)
    if kind_of(kind, where)[0] != "number":
        raise DataError(f"{where} is {kind}, expected numbers")
    made = Field(name, "number", str(kind), is_weight=True)
    return Weights(with_policy(made, data, name, where), where)


def _fit(
    made: Field, scale: Scale, where: str, kind: pa.DataType, unless_binary: bool = False
) -> Fit:
    if made.kind == "category":
        return Categories(made, where)
    if made.kind == "tokens" and not pa.types.is_integer(kind.value_type):
        return Categories(made, where)
    if made.kind in ("tokens", "labels"):
        return ClassNumbers(made, where)
    return Numbers(made, scale, where, unless_binary)
