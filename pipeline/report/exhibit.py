"""One picture of a report, or one table, with the numbers that it shows."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
"""Okabe and Ito's, which people with any colour vision tell apart."""
GREY = "#767676"
LONGEST_LABEL = 28
WIDTH, HEIGHT, DPI = 7.0, 4.2, 110
Columns = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Exhibit:
    """A picture with its numbers, or numbers alone."""

    name: str
    """Name of its files, without an ending."""
    title: str
    caption: str
    """What it shows, and how to read it."""
    table: Columns
    """Its numbers, by column."""
    png: bytes | None = None

    def to_csv(self) -> str:
        """The table as text."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.table)
        writer.writerows(zip(*self.table.values(), strict=True))
        return text.getvalue()


def plot(num_rows: int = 1, num_columns: int = 1, height: float = HEIGHT) -> tuple[Figure, Any]:
    """A figure on white, which is readable on dark pages too, and its axes: [rows, columns]."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["text.parse_math"] = False  # names of columns may hold anything
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained", facecolor="white")
    axes = figure.subplots(num_rows, num_columns, squeeze=False)
    for one in axes.flat:
        tidy(one)
    return figure, axes


def tidy(axes: Axes) -> None:
    """No frame, and faint lines."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)


def log_scale(axes: Axes) -> None:
    """Values by powers of ten, with plain numbers beside them."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    for put in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        put(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(axis="y", which="both", labelsize=8)


def png(figure: Figure) -> bytes:
    """The picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    content = io.BytesIO()
    draw: Any = FigureCanvasAgg(figure).print_png  # `savefig` lays everything out once more
    draw(content)
    return content.getvalue()


def short(name: str) -> str:
    """A name as it fits into a picture; matplotlib leaves out labels that begin with `_`."""
    text = " ".join(name.split())
    text = text if len(text) <= LONGEST_LABEL else f"{text[: LONGEST_LABEL - 3]}..."
    return f" {text}" if text.startswith("_") else text


def color(index: int) -> str:
    """The colour of a line among others."""
    return COLORS[index % len(COLORS)]


def rounded(values: Any, digits: int = 6) -> list[Any]:
    """Numbers with so many digits as people read."""
    return [float(f"{value:.{digits}g}") for value in values]
