"""CSV files: how they are parsed, and which type each column has, seen over whole files.

A type that is guessed from the first megabyte fails at the first value that does not fit; a file is
read through once instead, and a column gets the narrowest type that holds all of its values.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Iterable
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.dataset as ds

READ_BYTES = 2**24
END = "\N{END OF TEXT}"
EXACT = 2.0**53
"""Whole numbers from here on are not told apart by floats."""
_GUESSES = (
    pa.int64(),
    pa.uint64(),
    pa.bool_(),
    pa.date32(),
    pa.timestamp("s"),
    pa.timestamp("ns"),
    pa.float64(),
)
_MISFIT = re.compile(
    r"In CSV column #(\d+): .*conversion error to (.+?): invalid value '(.*)'$", re.S
)
_PARSED = pacsv.ParseOptions(newlines_in_values=True)  # else blocks are cut inside of quotes


def _convert(types: dict[str, pa.DataType] | None = None) -> pacsv.ConvertOptions:
    return pacsv.ConvertOptions(strings_can_be_null=False, column_types=types)


def reader() -> Any:
    """How data sets of CSV files are read; with their schema given, columns have its types."""
    return ds.CsvFileFormat(parse_options=_PARSED, convert_options=_convert())


def schema(path: str, filesystem: Any) -> pa.Schema:
    """Names and types of the columns. Raises ValueError naming the line that cannot be read."""
    _refuse_other_encodings(path, filesystem)
    types: dict[str, pa.DataType] = {}
    while True:
        with filesystem.open_input_stream(path) as file:
            try:
                reader = pacsv.open_csv(
                    file, parse_options=_PARSED, convert_options=_convert(types)
                )
                wider, last = _read_through(reader, types)
            except pa.ArrowInvalid as error:
                wider = _widen(str(error), path, filesystem)
        if not wider:
            if isinstance(last, str) and ("\n" in last or "\r" in last):
                _refuse_open_quote(path, filesystem)
            return reader.schema
        types |= wider


def _read_through(reader: Any, types: dict[str, pa.DataType]) -> tuple[dict[str, pa.DataType], Any]:
    """Columns of floats that may be larger whole numbers, as such; and the file's last cell."""
    types_seen: dict[str, pa.DataType] = {}
    last = None
    for batch in reader:
        for field, column in zip(batch.schema, batch.columns, strict=True):
            if pa.types.is_floating(field.type) and field.name not in {*types, *types_seen}:
                numbers = column.drop_null().to_numpy(zero_copy_only=False)
                if len(numbers) and abs(numbers).max() >= EXACT:
                    types_seen[field.name] = pa.uint64()
        if len(batch):
            last = batch.column(batch.num_columns - 1)[-1].as_py()
    return types_seen, last


def _widen(message: str, path: str, filesystem: Any) -> dict[str, pa.DataType]:
    """The type that a column needs for the value that its type does not hold."""
    misfit = _MISFIT.search(message)
    if misfit is None:
        _refuse_open_quote(path, filesystem)
        raise ValueError(_explain_ragged(path, filesystem) or message)
    column = int(misfit[1])
    kind = misfit[2]
    value = misfit[3]
    with filesystem.open_input_stream(path) as file:
        names = pacsv.open_csv(file, parse_options=_PARSED).schema.names
    return {names[column]: _holding(kind, value)}


def _holding(kind: str, value: str) -> pa.DataType:
    """The narrowest type for the value and for those before, which were of the type `kind`."""
    fitting = [guess for guess in _GUESSES if _fits(value, guess)]
    if kind == "null":
        return fitting[0] if fitting else pa.string()
    wider = {
        "int64": (pa.uint64(), pa.float64()),
        "uint64": (pa.float64(),),
        "date32[day]": (pa.timestamp("s"), pa.timestamp("ns")),
        "timestamp[s]": (pa.timestamp("ns"),),
    }.get(kind, ())
    if value.lstrip("+-").isdigit():  # beyond what floats tell apart: a name
        wider = tuple(one for one in wider if one != pa.float64())
    return next((one for one in wider if one in fitting), pa.string())


def _fits(value: str, kind: pa.DataType) -> bool:
    text = pa.py_buffer(b'"x"\n"' + value.replace('"', '""').encode() + b'"\n')
    try:
        pacsv.read_csv(
            pa.BufferReader(text), parse_options=_PARSED, convert_options=_convert({"x": kind})
        )
    except pa.ArrowInvalid:
        return False
    return True


def _refuse_other_encodings(path: str, filesystem: Any) -> None:
    """Raise ValueError for bytes that are not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with filesystem.open_input_stream(path) as file:
        while part := file.read(READ_BYTES):
            try:
                decoder.decode(part)
            except UnicodeDecodeError:
                raise ValueError(_not_utf8(path, filesystem)) from None


def _not_utf8(path: str, filesystem: Any) -> str:
    fix = "save the file as UTF-8 (iconv -f ENCODING -t UTF-8)"
    with filesystem.open_input_stream(path) as file:
        for line_number, line in enumerate(_lines(file), 1):
            if line_number == 1 and line[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                return f"{path} is UTF-16, expected UTF-8: {fix}"
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                shown = repr(line[max(error.start - 10, 0) : error.end + 10])
                return f"line {line_number} of {path} is not UTF-8 ({shown}): {fix}"
    return f"{path} is not UTF-8: {fix}"


def _lines(file: Any) -> Any:
    rest = b""
    while part := file.read(READ_BYTES):
        *whole, rest = (rest + part).split(b"\n")
        yield from whole
    yield rest


def _refuse_open_quote(path: str, filesystem: Any) -> None:
    """Raise ValueError where the last quoted cell never ends: it would be all rows after it."""
    with filesystem.open_input_stream(path) as file:
        rows = _rows(file, [END])
        end = 0
        row = [END]
        for row in rows:  # noqa: B007 (the last one is looked at)
            begins = end + 1
            end = rows.line_num
    if row != [END]:
        raise ValueError(
            f"{path}: the row that begins in line {begins} has a quote that is never closed, and "
            "takes all rows after it for one cell: close or double it"
        )


def _explain_ragged(path: str, filesystem: Any) -> str | None:
    """Which row has more or fewer cells than the header, if one has."""
    with filesystem.open_input_stream(path) as file:
        rows = _rows(file)
        start = 0
        header: list[str] = next(rows, [])
        for row in rows:
            if row and len(row) != len(header):
                return (
                    f"{path}: the row in line {start + 2} has {len(row)} cells, the header has "
                    f"{len(header)}"
                )
            start = rows.line_num - 1
    return None


def _rows(file: Any, more: Iterable[str] = ()) -> Any:
    """The file's rows as Python reads them, and those of `more` lines after its last."""
    return csv.reader(chain(io.TextIOWrapper(file, "utf-8", newline=""), more))
