"""Pictures of predicted classes, and of yes and no: confusion, ranking, calibration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.report.exhibit import GREY, Exhibit, color, plot, png, rounded, short
from pipeline.rundir.held_out import TermPredictions

MAX_CONFUSED = 30
"""Classes of a confusion matrix."""
MAX_LINES = 8
"""Classes that have a line of their own, the most frequent ones."""
MAX_TABLE = 200
"""Points of a line in a table."""
NUM_BINS = 10
Array = NDArray[Any]


@dataclass(frozen=True)
class Answers:
    """To one question, is it this class: how likely that is called, and whether it is true."""

    name: str
    score: Array
    truth: Array


def exhibits(term: TermPredictions) -> list[Exhibit]:
    """The pictures of a term with classes, or with one or more answers of yes and no."""
    width = math.prod(term.prediction.shape[1:])
    is_finite = np.isfinite(term.prediction).reshape(-1, width).all(1)
    prediction, truth = term.prediction[is_finite], term.truth[is_finite]
    if not len(truth):
        return []
    if term.task == "classes":
        return _of_classes(term, prediction, truth)
    return _of_answers(term, prediction.reshape(len(truth), -1), truth.reshape(len(truth), -1))


def _of_classes(term: TermPredictions, prediction: Array, truth: Array) -> list[Exhibit]:
    names, chosen = term.names, prediction.argmax(1)
    counts = [np.bincount(codes, minlength=len(names)) for codes in
              (truth[truth == chosen], chosen, truth)]  # fmt: skip
    drawn = [_confusion(names, chosen, truth), _per_class(names, *counts)]
    drawn += _ranks([Answers(names[i], prediction[:, i], truth == i) for i in _told(counts[2])])
    if term.are_probabilities:
        sure = prediction.max(1)
        drawn.append(_calibration([Answers("most likely class", sure, chosen == truth)]))
    return drawn


def _of_answers(term: TermPredictions, prediction: Array, truth: Array) -> list[Exhibit]:
    predicted_yes = prediction > term.decided_by
    if truth.shape[1] == 1:
        codes = predicted_yes[:, 0].astype(int), truth[:, 0].astype(int)
        noun = "a probability" if term.are_probabilities else "a score"
        yes = f"{term.answers[0][1]} is predicted above {noun} of {term.decided_by[0]:.4g}."
        drawn = [_confusion(list(term.answers[0]), *codes, note=yes)]
    else:
        drawn = [
            _per_class(
                term.names, *(a.sum(0) for a in (predicted_yes & truth, predicted_yes, truth))
            )
        ]
    counts = truth.sum(0)
    answers = [Answers(term.names[i], prediction[:, i], truth[:, i]) for i in _told(counts)]
    drawn += _ranks(answers)
    if term.are_probabilities:
        shown = np.argsort(-counts, kind="stable")[:MAX_LINES]
        drawn.append(
            _calibration([Answers(term.names[i], prediction[:, i], truth[:, i]) for i in shown])
        )
    return drawn


def _told(counts: Array) -> list[int]:
    """Classes that there are, the most frequent ones first."""
    order = np.argsort(-counts, kind="stable")[:MAX_LINES]
    return [int(index) for index in order if counts[index]]


def _confusion(names: list[str], chosen: Array, truth: Array, note: str = "") -> Exhibit:
    """Rows by true and predicted class; of many classes, the most frequent ones."""
    counts = np.bincount(truth, minlength=len(names))
    shown = np.sort(np.argsort(-counts, kind="stable")[:MAX_CONFUSED])
    size = len(shown)
    place = np.full(len(names), -1)
    place[shown] = np.arange(size)
    both = place[truth], place[chosen]
    held = (both[0] >= 0) & (both[1] >= 0)
    part = np.zeros((size, size), np.int64)
    np.add.at(part, (both[0][held], both[1][held]), 1)
    shares = part / np.maximum(counts[shown][:, None], 1)
    figure, axes = plot(height=min(3.2 + 0.25 * size, 9.0))
    axis = axes[0, 0]
    axis.grid(False)
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the true class")
    labels = [short(names[i]) for i in shown]
    axis.set_xticks(range(size), labels, rotation=90 if size > 5 else 0, fontsize=8)
    axis.set_yticks(range(size), labels, fontsize=8)
    if size <= 15:
        for y, x in np.ndindex(size, size):
            shade = "white" if shares[y, x] > 0.5 else "black"
            axis.text(x, y, f"{part[y, x]:,}", ha="center", va="center", color=shade, fontsize=8)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    columns = {f"predicted {names[i]}": part[:, k].tolist() for k, i in enumerate(shown)}
    table = {"true": [names[i] for i in shown], **columns}
    is_part = size < len(names)
    more = f" The {size} most frequent of {len(names)} classes." if is_part else ""
    caption = f"Rows of each true class, by the predicted class.{more} {note}".rstrip()
    return Exhibit("confusion", "Confusion matrix", caption, table, png(figure))


def _per_class(names: list[str], right: Array, predicted: Array, actual: Array) -> Exhibit:
    """Precision, recall and F1 of each class, and how many rows it has."""
    with np.errstate(invalid="ignore", divide="ignore"):
        precision, recall = right / predicted, right / actual
        f1 = 2 * right / (predicted + actual)
    table = {
        "class": names,
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
    axis.set_yticks(places, [short(names[i]) for i in shown], fontsize=8)
    axis.set_xlim(0, 1)
    axis.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    caption = "Precision: how many predicted to be of it are. Recall: how many of it are found."
    return Exhibit("per_class", "Each class", caption, table, png(figure))


def _ranks(answers: list[Answers]) -> list[Exhibit]:
    """ROC and precision over recall, of each class against the rest."""
    from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_curve

    answers = [one for one in answers if one.truth.any() and not one.truth.all()]
    if not answers:
        return []
    roc: dict[str, list[Any]] = {"class": [], "false_positive_rate": [], "true_positive_rate": []}
    pr: dict[str, list[Any]] = {"class": [], "recall": [], "precision": []}
    roc_figure, ((roc_axis,),) = plot()
    pr_figure, ((pr_axis,),) = plot()
    for index, one in enumerate(answers):
        false, true, _ = roc_curve(one.truth, one.score)
        precision, recall, _ = precision_recall_curve(one.truth, one.score)
        name, shade = short(one.name), color(index)
        average = average_precision_score(one.truth, one.score)
        roc_axis.plot(false, true, color=shade, label=f"{name}, area {auc(false, true):.3f}")
        label = f"{name}, average {average:.3f}"
        pr_axis.step(recall, precision, where="post", color=shade, label=label)
        pr_axis.axhline(one.truth.mean(), color=shade, linestyle=":", lw=0.8)
        for table, points in ((roc, (false, true)), (pr, (recall, precision))):
            size = len(points[0])
            some = np.unique(np.linspace(0, size - 1, min(size, MAX_TABLE)).astype(int))
            cells = [[one.name] * len(some), *(rounded(values[some]) for values in points)]
            for column, values in zip(table.values(), cells, strict=True):
                column.extend(values)
    roc_axis.plot([0, 1], [0, 1], color=GREY, linestyle=":", label="by chance")
    for axis, x, y in (
        (roc_axis, "false positive rate", "true positive rate"),
        (pr_axis, "recall", "precision"),
    ):
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        axis.set_xlim(-0.01, 1.01)
        axis.set_ylim(-0.01, 1.03)
        axis.legend(frameon=False, fontsize=8)
    roc_text = "True positive rate (recall) over false positive rate."
    pr_text = "Precision over recall; dotted: by chance."
    return [
        Exhibit("roc", "ROC", roc_text, roc, png(roc_figure)),
        Exhibit("precision_recall", "Precision and recall", pr_text, pr, png(pr_figure)),
    ]


def _calibration(answers: list[Answers]) -> Exhibit:
    """What share comes true of what is given each probability."""
    figure, axes = plot(2, 1)
    upper, lower = axes[:, 0]
    upper.plot([0, 1], [0, 1], color=GREY, linestyle=":", label="perfect")
    edges = np.linspace(0, 1, NUM_BINS + 1)
    table: dict[str, list[Any]] = {"of": [], "probability": [], "came_true": [], "rows": []}
    for index, one in enumerate(answers):
        bins = np.clip((one.score * NUM_BINS).astype(int), 0, NUM_BINS - 1)
        counts = np.bincount(bins, minlength=NUM_BINS)
        held = counts > 0
        mean = np.bincount(bins, one.score, NUM_BINS)[held] / counts[held]
        share = np.bincount(bins, one.truth, NUM_BINS)[held] / counts[held]
        upper.plot(mean, share, marker="o", markersize=4, color=color(index), label=short(one.name))
        lower.stairs(counts, edges, color=color(index), fill=len(answers) == 1, alpha=0.8)
        table["of"] += [one.name] * int(held.sum())
        table["probability"] += rounded(mean)
        table["came_true"] += rounded(share)
        table["rows"] += counts[held].tolist()
    upper.set_ylabel("share that is true")
    upper.legend(frameon=False, fontsize=8)
    lower.set_ylabel("rows")
    lower.set_xlabel("predicted probability")
    caption = "On the diagonal, of what is called 70 % likely 70 % is true; below it, less."
    return Exhibit("calibration", "Calibration", caption, table, png(figure))
