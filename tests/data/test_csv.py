"""CSV files hold what Python's own `csv` reads from them, or are refused by file and line."""

from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data.locate import locate
from pipeline.data.reader import open_sources
from pipeline.errors import DataError
from pipeline.spec.data import Data


def source(folder: Path, **data: Any) -> Any:
    given_data = {"train": "rows.csv", "target": "y"} | data
    return open_sources(locate(Data(**given_data), folder))


def cells(folder: Path, **data: Any) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for block in source(folder, **data)["train"].blocks():
        for name in block.table.column_names:
            found.setdefault(name, []).extend(block.table[name].to_pylist())
    return found


EXAMPLES = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
CELL = st.text(
    st.one_of(st.sampled_from(" ,;\"\n\r\t'aé1.-"), st.characters(exclude_categories=["Cs", "Cc"])),
    max_size=12,
)
ROWS = st.lists(st.tuples(CELL, CELL), min_size=1, max_size=12)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=ROWS, end=st.sampled_from(["\n", "\r\n", "\r"]),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL, csv.QUOTE_NONNUMERIC]),
)  # fmt: skip
def test_random_cells_are_those_of_pythons_csv(
    rows: list[tuple[str, str]], end: str, quoting: Any, tmp_path: Path
) -> None:
    text = io.StringIO()
    if any(c in cell for row in rows for cell in row for c in "\r\n"):
        quoting = csv.QUOTE_ALL  # the writer leaves line ends other than its own unquoted
    writer = csv.writer(text, lineterminator=end, quoting=quoting)
    writer.writerow(["label", "text", "y"])
    writer.writerows([f"l{label}", f"t{text}", "m"] for label, text in rows)
    (tmp_path / "rows.csv").write_bytes(text.getvalue().encode())
    with (tmp_path / "rows.csv").open(encoding="utf-8", newline="") as file:
        header, *wanted = csv.reader(file)
    found = cells(tmp_path, inputs=["label", "text"])
    assert list(found) == header
    assert list(zip(*found.values(), strict=True)) == [tuple(row) for row in wanted]


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(body=st.text(st.sampled_from('ab,"\n'), max_size=30))
def test_what_is_not_well_formed_is_read_as_python_does_or_refused(
    body: str, tmp_path: Path
) -> None:
    (tmp_path / "rows.csv").write_text(f"x,y\nk,k\n{body}\n", encoding="utf-8", newline="")
    with (tmp_path / "rows.csv").open(encoding="utf-8", newline="") as file:
        _, *wanted = [row for row in csv.reader([*file, "a,last line"]) if row]
    is_open = wanted.pop() != ["a", "last line"]
    if is_open or any(len(row) != 2 for row in wanted):
        with pytest.raises(DataError, match=r"rows.csv"):
            cells(tmp_path)
        return
    found = cells(tmp_path)
    assert [list(row) for row in zip(found["x"], found["y"], strict=True)] == [
        [cell or None for cell in row] for row in wanted
    ]


def test_line_breaks_inside_quotes_are_read_across_blocks(tmp_path: Path) -> None:
    """Sixty thousand rows of more than a megabyte, in which any line may begin inside a cell."""
    rng = np.random.default_rng(0)
    rows = [
        (
            "yes" if rng.random() < 0.5 else "no",
            "\n".join(["some words, here"] * rng.integers(1, 5)),
        )
        for _ in range(60_000)
    ]
    with (tmp_path / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["y", "text"])
        writer.writerows(rows)
    found = cells(tmp_path)
    assert list(zip(found["y"], found["text"], strict=True)) == rows


LATE = 200_000
"""Rows of a few bytes: several of the blocks from whose first types were guessed."""


@pytest.mark.parametrize(
    ("first", "late", "kind"),
    [
        ("1", "2.5", "double"),
        ("1", "x", "string"),
        ("1.5", "none of these", "string"),
        ("", "7", "int64"),
        ("", "x", "string"),
        ("", "true", "bool"),
        ("2013-01-01", "2013-01-01 12:30:00", "timestamp[s]"),
        ("2013-01-01", "later", "string"),
        ("true", "maybe", "string"),
        ("1", str(2**64 - 1), "uint64"),
        ("1", str(2**70), "string"),
        (str(2**64 - 1), "5", "uint64"),
        ("1e300", "2", "double"),
    ],
)
def test_a_type_that_shows_late_in_the_file_holds_all_values(
    first: str, late: str, kind: str, tmp_path: Path
) -> None:
    lines = ["x,y", *[f"{first},k"] * LATE, f"{late},k"]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    train = source(tmp_path)["train"]
    assert str(train.schema.field("x").type) == kind
    assert len(cells(tmp_path)["x"]) == LATE + 1


def test_files_of_one_table_have_one_type_for_a_column(tmp_path: Path) -> None:
    parts = {"a": "x,z,y\n1,,k\n", "b": "x,z,y\n2.5,3,k\n", "c": "x,z,y\nthree,4.5,k\n"}
    for name, text in parts.items():
        (tmp_path / f"{name}.csv").write_text(text)
    train, validation = source(tmp_path, train="a.csv", validation="b.csv").values()
    assert str(train.schema.field("x").type) == str(validation.schema.field("x").type) == "double"
    assert str(train.schema.field("z").type) == "int64"
    assert cells(tmp_path, train="*.csv")["x"] == ["1", "2.5", "three"]


def test_text_in_the_validation_file_alone_turns_no_amount_into_a_name(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("x,y\n1,k\n2,k\n")
    (tmp_path / "held.csv").write_text("x,y\n1,k\nunknown,k\n")
    with pytest.raises(DataError, match=r"column 'x' is string, in data.train it is int64"):
        source(tmp_path, validation="held.csv")
    train = source(tmp_path, validation="held.csv", categorical=["x"], inputs=["x"])["train"]
    assert str(train.schema.field("x").type) == "string"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x,y\nnäme,2\n".encode("latin-1"), r"line 2 of .*rows.csv is not UTF-8 .*iconv"),
        ("näme,y\n1,2\n".encode("latin-1"), r"line 1 of .*rows.csv is not UTF-8 .*iconv"),
        (b"x,y\n" + b"a,1\n" * 10**6 + b"\xff,1\n", r"line 1000002 of .* is not UTF-8"),
        ("x,y\n1,2\n".encode("utf-16"), r"rows.csv is UTF-16, expected UTF-8"),
        (b'x,y\na,1\n"b,2\nc,3\nd,4\n', r"line 3 has a quote that is never closed"),
        (b"x,y\n1,2\n1\n", r"the row in line 3 has 1 cells, the header has 2"),
        (b'x,y\n"1\n2",2\n1,2,3\n', r"the row in line 4 has 3 cells, the header has 2"),
    ],
)
def test_what_cannot_be_read_is_named_by_file_and_line(
    content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / "rows.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        source(tmp_path)


def test_a_compressed_file_is_the_same_file(tmp_path: Path) -> None:
    text = 'x,y\n"a\nb",1\nc,2\n'
    (tmp_path / "rows.csv").write_text(text)
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(text.encode()))
    assert cells(tmp_path, train="rows.csv.gz") == cells(tmp_path)


def test_a_lone_quote_inside_a_cell_is_a_character(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('x,y\n5" pipe,1\n3 pipe,2\n')
    assert cells(tmp_path)["x"] == ['5" pipe', "3 pipe"]
