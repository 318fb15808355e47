"""Pictures of predicted classes, and of yes and no: what is taken for what, and how surely."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.report.exhibit import GREY, Exhibit, color, plot, png, rounded
from pipeline.rundir.held_out import TermPredictions

MAX_CONFUSED = 30
"""Classes of a confusion matrix."""
MAX_LINES = 8
"""Classes that have a line of their own, the most frequent ones."""
MAX_TABLE = 200
"""Points of a line in a table."""
NUM_BINS = 10
Array = NDArray[Any]


def exhibits(term: TermPredictions) -> list[Exhibit]:
    """The pictures of a term with classes, or with one or more answers of yes and no."""
    if term.task == "classes":
        chosen = term.prediction.argmax(1)
        truths = term.truth[:, None] == np.arange(term.prediction.shape[1])
        made = [
            _confusion(term.names, chosen, term.truth),
            _per_class(term.names, np.eye(len(truths[0]), dtype=bool)[chosen], truths),
            *_ranks(term.names, term.prediction, truths),
        ]
        if term.are_probabilities:
            sure = term.prediction.max(1)
            made.append(_calibration({"most likely class": (sure, chosen == term.truth)}))
        return made
    prediction, truths = (a.reshape(len(a), -1) for a in (term.prediction, term.truth))
    said = prediction > (0.5 if term.are_probabilities else 0.0)
    names = term.names if len(term.names) == prediction.shape[1] else _numbered(prediction)
    if prediction.shape[1] == 1:
        made = [_confusion(term.answers, said[:, 0].astype(int), truths[:, 0].astype(int))]
    else:
        made = [_per_class(names, said, truths)]
    made += _ranks(names, prediction, truths)
    if term.are_probabilities:
        shown = _most_frequent(truths)
        pairs = {names[i]: (prediction[:, i], truths[:, i]) for i in shown}
        made.append(_calibration(pairs))
    return made


def _numbered(prediction: Array) -> list[str]:
    return [str(index) for index in range(prediction.shape[1])]


def _most_frequent(truths: Array) -> list[int]:
    """Classes that have both rows of theirs and others, the most frequent ones first."""
    counts = truths.sum(0)
    order = np.argsort(-counts, kind="stable")[:MAX_LINES]
    return [int(index) for index in order if 0 < counts[index] < len(truths)]


def _confusion(names: list[str], chosen: Array, truth: Array) -> Exhibit:
    """Rows by true and predicted class; of many classes, the most frequent ones."""
    num_classes = max(len(names), int(chosen.max()) + 1, int(truth.max()) + 1)
    names = [*names, *map(str, range(len(names), num_classes))]
    counts = np.bincount(truth * num_classes + chosen, minlength=num_classes**2)
    counts = counts.reshape(num_classes, num_classes)
    shown = np.sort(np.argsort(-counts.sum(1), kind="stable")[:MAX_CONFUSED])
    part = counts[np.ix_(shown, shown)]
    shares = part / np.maximum(counts[shown].sum(1, keepdims=True), 1)
    size = len(shown)
    figure, axes = plot(height=min(3.2 + 0.25 * size, 9.0))
    axis = axes[0, 0]
    axis.grid(False)
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the true class")
    labels = [names[i][:20] for i in shown]
    axis.set_xticks(range(size), labels, rotation=90 if size > 5 else 0, fontsize=8)
    axis.set_yticks(range(size), labels, fontsize=8)
    if size <= 15:
        for y, x in np.ndindex(size, size):
            shade = "white" if shares[y, x] > 0.5 else "black"
            axis.text(x, y, f"{part[y, x]:,}", ha="center", va="center", color=shade, fontsize=8)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    table = {"true": labels, **{f"predicted {names[i]}": part[:, k].tolist()
                                for k, i in enumerate(shown)}}  # fmt: skip
    more = f" The {size} most frequent of {num_classes} classes." if size < num_classes else ""
    caption = f"Validation rows of each true class, by what they are taken for.{more}"
    return Exhibit("confusion", "Confusion matrix", caption, table, png(figure))


def _per_class(names: list[str], said: Array, truths: Array) -> Exhibit:
    """Precision, recall and F1 of each class, and how many rows it has."""
    right, predicted, actual = (a.sum(0) for a in (said & truths, said, truths))
    with np.errstate(invalid="ignore", divide="ignore"):
        precision, recall = right / predicted, right / actual
        f1 = 2 * right / (predicted + actual)
    names = [*names, *map(str, range(len(names), len(actual)))]
    table = {
        "class": names[: len(actual)],
        "precision": rounded(precision, 4),
        "recall": rounded(recall, 4),
        "f1": rounded(f1, 4),
        "rows": actual.tolist(),
    }
    shown = np.sort(np.argsort(-actual, kind="stable")[:MAX_CONFUSED])
    figure, axes = plot(height=1.2 + 0.3 * len(shown))
    axis = axes[0, 0]
    places = np.arange(len(shown))
    for offset, (label, values) in enumerate((("precision", precision), ("recall", recall))):
        heights = np.nan_to_num(values[shown])
        axis.barh(places + 0.38 * offset - 0.19, heights, 0.36, color=color(offset), label=label)
    axis.set_yticks(places, [names[i][:20] for i in shown], fontsize=8)
    axis.set_xlim(0, 1)
    axis.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    caption = "Precision: how many predicted to be of it are. Recall: how many of it are found."
    return Exhibit("per_class", "Each class", caption, table, png(figure))


def _ranks(names: list[str], prediction: Array, truths: Array) -> list[Exhibit]:
    """ROC and precision over recall, of each class against the rest."""
    from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_curve

    shown = _most_frequent(truths)
    if not shown or not np.isfinite(prediction).all():
        return []
    roc: dict[str, list[Any]] = {"class": [], "false_positive_rate": [], "true_positive_rate": []}
    pr: dict[str, list[Any]] = {"class": [], "recall": [], "precision": []}
    roc_figure, roc_axes = plot()
    pr_figure, pr_axes = plot()
    for index in shown:
        truth, score = truths[:, index], prediction[:, index]
        false, true, _ = roc_curve(truth, score)
        precision, recall, _ = precision_recall_curve(truth, score)
        name = names[index] if index < len(names) else str(index)
        roc_label = f"{name}, area {auc(false, true):.3f}"
        pr_label = f"{name}, average {average_precision_score(truth, score):.3f}"
        roc_axes[0, 0].plot(false, true, color=color(shown.index(index)), label=roc_label)
        pr_axes[0, 0].step(
            recall, precision, where="post", color=color(shown.index(index)), label=pr_label
        )
        pr_axes[0, 0].axhline(truth.mean(), color=color(shown.index(index)), linestyle=":", lw=0.8)
        for table, (x, y) in ((roc, (false, true)), (pr, (recall, precision))):
            some = np.unique(np.linspace(0, len(x) - 1, min(len(x), MAX_TABLE)).astype(int))
            columns = list(table)
            table[columns[0]] += [name] * len(some)
            table[columns[1]] += rounded(x[some])
            table[columns[2]] += rounded(y[some])
    roc_axes[0, 0].plot([0, 1], [0, 1], color=GREY, linestyle=":", label="by chance")
    for axis, x, y in (
        (roc_axes[0, 0], "false positive rate", "true positive rate"),
        (pr_axes[0, 0], "recall", "precision"),
    ):
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        axis.set_xlim(-0.01, 1.01)
        axis.set_ylim(-0.01, 1.03)
        axis.legend(frameon=False, fontsize=8)
    roc_text = "Share of the yeses that are found, for each share of noes taken for yes."
    pr_text = "How many are right, for each share of the yeses found; dotted: by chance."
    return [
        Exhibit("roc", "ROC", roc_text, roc, png(roc_figure)),
        Exhibit("precision_recall", "Precision and recall", pr_text, pr, png(pr_figure)),
    ]


def _calibration(pairs: dict[str, tuple[Array, Array]]) -> Exhibit:
    """What share comes true of what is given each probability."""
    figure, axes = plot(2, 1)
    upper, lower = axes[:, 0]
    upper.plot([0, 1], [0, 1], color=GREY, linestyle=":", label="honest")
    edges = np.linspace(0, 1, NUM_BINS + 1)
    table: dict[str, list[Any]] = {"of": [], "probability": [], "came_true": [], "rows": []}
    for index, (name, (chance, came_true)) in enumerate(pairs.items()):
        bins = np.minimum((chance * NUM_BINS).astype(int), NUM_BINS - 1)
        counts = np.bincount(bins, minlength=NUM_BINS)
        held = counts > 0
        mean = np.bincount(bins, chance, NUM_BINS)[held] / counts[held]
        share = np.bincount(bins, came_true, NUM_BINS)[held] / counts[held]
        upper.plot(mean, share, marker="o", markersize=4, color=color(index), label=name)
        lower.stairs(counts, edges, color=color(index), fill=len(pairs) == 1, alpha=0.8)
        table["of"] += [name] * int(held.sum())
        table["probability"] += rounded(mean)
        table["came_true"] += rounded(share)
        table["rows"] += counts[held].tolist()
    upper.set_ylabel("share that is true")
    upper.legend(frameon=False, fontsize=8)
    lower.set_ylabel("rows")
    lower.set_xlabel("predicted probability")
    caption = "On the diagonal, of what is called 70 % likely 70 % is true; below it, less."
    return Exhibit("calibration", "Calibration", caption, table, png(figure))
