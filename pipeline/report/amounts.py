"""Pictures of predicted amounts: against the truth, their errors, where these are large."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.report.exhibit import GREY, Exhibit, color, plot, png, rounded, short
from pipeline.rundir.held_out import TermPredictions

MAX_COLUMNS = 4
"""Target columns, or positions of a vector, that have pictures."""
MAX_DOTS = 3000
"""Above which dots are counted in cells."""
NUM_GROUPS = 10
MAX_TABLE = 1000
Numbers = NDArray[np.float64]


def exhibits(term: TermPredictions) -> list[Exhibit]:
    """The pictures of each target column, of the first ones where there are many."""
    drawn = []
    for name, prediction, truth in zip(
        term.names[:MAX_COLUMNS], term.prediction.T, term.truth.T, strict=False
    ):
        finite = np.isfinite(prediction) & np.isfinite(truth)
        if finite.any():
            both = tuple(values[finite].astype(float) for values in (prediction, truth))
            drawn += [draw(name, *both) for draw in (_against_truth, _errors, _by_group)]
    return drawn


def _against_truth(name: str, prediction: Numbers, truth: Numbers) -> Exhibit:
    figure, axes = plot()
    axis = axes[0, 0]
    if len(truth) > MAX_DOTS:
        cells = axis.hexbin(truth, prediction, gridsize=50, mincnt=1, bins="log", cmap="viridis")
        figure.colorbar(cells, label="rows")
    else:
        axis.scatter(truth, prediction, s=10, alpha=0.6, color=color(0), linewidths=0)
    ends = [min(truth.min(), prediction.min()), max(truth.max(), prediction.max())]
    axis.plot(ends, ends, color=GREY, linestyle=":", label="perfect")
    axis.set_xlabel(f"true {short(name)}")
    axis.set_ylabel(f"predicted {short(name)}")
    axis.legend(frameon=False, fontsize=8)
    some = np.linspace(0, len(truth) - 1, min(len(truth), MAX_TABLE)).astype(int)
    table = {"true": rounded(truth[some]), "predicted": rounded(prediction[some])}
    caption = "Each row. Dots in a flat band are predictions that know only the mean."
    return Exhibit(
        f"predicted_{name}", f"Predicted against true {name}", caption, table, png(figure)
    )


def _errors(name: str, prediction: Numbers, truth: Numbers) -> Exhibit:
    errors = prediction - truth
    figure, axes = plot(1, 2)
    counts, edges = _histogram(errors)
    left, right = axes[0]
    left.stairs(counts, edges, fill=True, color=color(0), alpha=0.8)
    left.axvline(0, color=GREY, linestyle=":")
    left.set_xlabel("predicted - true")
    left.set_ylabel("rows")
    some = np.linspace(0, len(errors) - 1, min(len(errors), MAX_DOTS)).astype(int)
    right.scatter(prediction[some], errors[some], s=8, alpha=0.5, color=color(0), linewidths=0)
    right.axhline(0, color=GREY, linestyle=":")
    right.set_xlabel(f"predicted {short(name)}")
    right.set_ylabel("predicted - true")
    table = {"from": rounded(edges[:-1]), "to": rounded(edges[1:]), "rows": counts.tolist()}
    caption = (
        f"Mean error {errors.mean():.4g}, deviation {errors.std():.4g}. A slope or a funnel on the "
        "right is what the model has not learnt."
    )
    return Exhibit(f"errors_{name}", f"Errors of {name}", caption, table, png(figure))


def _histogram(values: Numbers) -> tuple[NDArray[np.int64], Numbers]:
    """Counts and the edges of bins; one bin for values that are hardly told apart."""
    low, high = float(values.min()), float(values.max())
    size = max(abs(low), abs(high), 1e-300)
    if high - low > 1e-9 * size:
        return np.histogram(values, bins=min(40, max(10, len(values) // 10)))
    return np.array([len(values)]), np.array([low - 0.5 * size, high + 0.5 * size])


def _by_group(name: str, prediction: Numbers, truth: Numbers) -> Exhibit:
    """Errors by tenths of the predictions."""
    order = np.argsort(prediction, kind="stable")
    groups = [part for part in np.array_split(order, NUM_GROUPS) if len(part)]
    errors = prediction - truth
    table: dict[str, list[Any]] = {
        "from": rounded(prediction[part].min() for part in groups),
        "to": rounded(prediction[part].max() for part in groups),
        "rows": [len(part) for part in groups],
        "mean_absolute_error": rounded(np.abs(errors[part]).mean() for part in groups),
        "mean_error": rounded(errors[part].mean() for part in groups),
    }
    figure, axes = plot()
    axis = axes[0, 0]
    places = np.arange(len(groups))
    axis.bar(places - 0.2, table["mean_absolute_error"], 0.4, color=color(0), label="absolute")
    axis.bar(places + 0.2, table["mean_error"], 0.4, color=color(1), label="predicted - true")
    axis.axhline(0, color=GREY, linewidth=0.8)
    texts = [f"{a:.3g}\n{b:.3g}" for a, b in zip(table["from"], table["to"], strict=True)]
    axis.set_xticks(places, texts, fontsize=7)
    axis.set_xlabel(f"predicted {short(name)}, from and to")
    axis.set_ylabel("mean error")
    axis.legend(frameon=False, fontsize=8)
    caption = (
        "In each tenth of the rows, by what is predicted. Where predictions are too high or too "
        "low on the whole, there is something left to learn."
    )
    return Exhibit(f"tenths_{name}", f"Error by tenth of {name}", caption, table, png(figure))
