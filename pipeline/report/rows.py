"""What the trained model relies on, and the rows that it is most wrong about."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.report.exhibit import Exhibit, color, plot, png, rounded, short
from pipeline.rundir.held_out import HeldOut, TermPredictions
from pipeline.rundir.records import Importance

NUM_WORST = 20
MAX_INPUTS = 30


def importance(measured: Importance) -> Exhibit:
    """What shuffling each input among the rows costs, the dearest first."""
    ordered = sorted(measured.rises.items(), key=lambda pair: -pair[1])
    names, rises = [name for name, _ in ordered], [rise for _, rise in ordered]
    shown = names[:MAX_INPUTS]
    figure, axes = plot(height=1.0 + 0.28 * max(len(shown), 2))
    axis = axes[0, 0]
    axis.barh(np.arange(len(shown)), rises[:MAX_INPUTS], color=color(0))
    axis.set_yticks(np.arange(len(shown)), [short(name) for name in shown], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("rise of the validation loss when the input is shuffled")
    late = f" There was no time for {', '.join(measured.left_out)}." if measured.left_out else ""
    caption = (
        f"From a loss of {measured.loss:.4g} over {measured.num_rows:,} validation rows; "
        "below 0 the loss falls without the input. Of few rows, small differences are chance. "
        f"Inputs that say the same share what they are worth.{late}"
    )
    table = {"input": names, "rise_of_loss": rounded(rises)}
    return Exhibit("inputs", "What the model relies on", caption, table, png(figure))


def worst(held_out: HeldOut, term: TermPredictions) -> Exhibit:
    """The rows with the largest errors, by file and row."""
    errors, says, truth = _errors(term)
    errors = np.nan_to_num(errors, nan=np.inf)  # a prediction that is no number is the worst
    order = np.argsort(-errors, kind="stable")[:NUM_WORST]
    rows = term.row.reshape(len(term.row), -1)
    columns = rows.shape[1]
    table: dict[str, list[Any]] = {"file": [], "row": []}
    if columns > 1:
        table["of"] = []
    table |= {"true": [], "predicted": [], "error": []}
    for flat in order:
        item, column = divmod(int(flat), columns)
        path, index = held_out.find(int(rows[item, column]))
        table["file"].append(path)
        table["row"].append(index)
        if columns > 1:
            table["of"].append(term.names[column])
        table["true"].append(truth[flat])
        table["predicted"].append(says[flat])
        table["error"] += rounded([errors[flat]], 4)
    sample = " among the rows that were kept" if held_out.is_sample else ""
    meaning = {
        "values": "the distance from the truth",
        "binary": "how far from the truth the answer is",
        "classes": "what the true class lacks"
        + (" to certain" if term.are_probabilities else " to the chosen one"),
    }[term.task]
    caption = (
        f"The {len(order)} largest errors{sample}: {meaning}. Rows are counted from 0 in their "
        "file. Wrong labels and broken inputs are often found here."
    )
    return Exhibit("worst_rows", "The rows it is most wrong about", caption, table)


def _errors(term: TermPredictions) -> tuple[NDArray[np.float64], list[Any], list[Any]]:
    """Of all items and columns, one after another: how wrong, what is said, and what is true."""
    prediction, truth = term.prediction.astype(float), term.truth
    if term.task == "classes":
        own = np.take_along_axis(prediction, truth[:, None], 1)[:, 0]
        best = prediction.argmax(1)
        errors = (1.0 if term.are_probabilities else prediction.max(1)) - own
        says = [
            f"{term.names[code]} ({prediction[i, code]:.3g}), true: {own[i]:.3g}"
            for i, code in enumerate(best)
        ]
        return errors, says, [term.names[code] for code in truth]
    flat, true = prediction.ravel(), truth.ravel()
    if term.task == "values":
        return np.abs(flat - true), rounded(flat), rounded(true)
    errors = np.abs(flat - true) if term.are_probabilities else np.where(true, -flat, flat)
    return (
        errors,
        rounded(flat, 4),
        [term.answers[index % len(term.answers)][int(one)] for index, one in enumerate(true)],
    )
