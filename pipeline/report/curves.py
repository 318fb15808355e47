"""Pictures of the journal: losses, metrics, learning rate and gradient norm by step."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.report.exhibit import GREY, Exhibit, color, log_scale, plot, png, rounded
from pipeline.rundir.records import Numbers, Point

MAX_POINTS = 1000
"""Of a line; of more steps, each point stands for several."""
MAX_MARKED = 50
"""Points of a line that are shown as such."""
MAX_METRICS = 6
SHARE = "share/"
Series = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Steps and values."""


class Curves:
    """Every value of a journal, by name; points are added as they are read."""

    def __init__(self) -> None:
        self._train: dict[str, Line] = {}
        self._validation: dict[str, Line] = {}
        self._throughput: dict[str, Line] = {}
        self.baselines: Numbers = {}

    def add(self, points: Iterable[Point]) -> Curves:
        """Take in these points, the next ones in order."""
        for point in points:
            if "train" in point:
                _add(self._train, point["step"], point["train"])
                if len(point["terms"]) > 1:
                    terms = {f"loss/{name}": value for name, value in point["terms"].items()}
                    _add(self._train, point["step"], terms)
            elif "validation" in point:
                _add(self._validation, point["step"], point["validation"])
                self.baselines = point.get("baselines", self.baselines)
            if "event" not in point:
                _add(self._throughput, point["step"], point.get("throughput", {}))
        return self

    @property
    def train(self) -> dict[str, Series]:
        """Losses, learning rate and gradient norm of the steps."""
        return {name: line.series() for name, line in self._train.items()}

    @property
    def validation(self) -> dict[str, Series]:
        """Losses and metrics of the evaluations."""
        return {name: line.series() for name, line in self._validation.items()}

    @property
    def throughput(self) -> dict[str, Series]:
        """Speed, and shares of the time."""
        return {name: line.series() for name, line in self._throughput.items()}


class Line:
    """Steps and values, as plain numbers: a journal may be long."""

    def __init__(self) -> None:
        self.steps, self.values = array("q"), array("d")

    def series(self) -> Series:
        """Both as arrays."""
        return np.array(self.steps, np.float64), np.array(self.values)


def exhibits(curves: Curves) -> list[Exhibit]:
    """What there is to see of the curves."""
    train, validation = curves.train, curves.validation
    drawn = [_losses(train, validation)] if "loss" in train else []
    metrics = {k: v for k, v in validation.items() if k.partition("/")[0] != "loss"}
    drawn += [_metrics(metrics, curves.baselines)] if metrics else []
    drawn += [_steps(train)] if "learning_rate" in train else []
    return drawn


def _losses(train: Mapping[str, Series], validation: Mapping[str, Series]) -> Exhibit:
    """Training and validation loss, and those of all terms, in one picture."""
    figure, axes = plot()
    axis = axes[0, 0]
    table: dict[str, list[Any]] = {"split": [], "loss": [], "step": [], "value": []}
    names = [name for name in train if name.partition("/")[0] == "loss"]
    for index, name in enumerate(sorted(names, key=len)):
        for split, series, style in (
            ("training", train.get(name), {"linewidth": 1.0, "alpha": 0.8}),
            ("validation", validation.get(name), {"linestyle": "--"}),
        ):
            if series is None:
                continue
            steps, values = thin(*series)
            if split == "validation":
                style = style | _marked(steps)
            label = split if len(names) == 1 else f"{split} {name}"
            shade = color(2 * index + (split == "validation")) if len(names) == 1 else color(index)
            axis.plot(steps, values, label=label, color=shade, **style)
            table["split"] += [split] * len(steps)
            table["loss"] += [name] * len(steps)
            table["step"] += steps.astype(int).tolist()
            table["value"] += rounded(values)
    positive = all(value > 0 for value in table["value"])
    if positive and table["value"] and max(table["value"]) > 20 * min(table["value"]):
        log_scale(axis)
    axis.set_xlabel("step")
    axis.set_ylabel("loss")
    axis.legend(frameon=False, fontsize=8)
    several = len(train["loss"][0]) > MAX_POINTS
    mean = " Each point of training is the mean of several steps." if several else ""
    caption = (
        "Loss of each step over its whole global batch, and of the validation rows. A validation "
        f"loss that rises while training's falls is overfitting.{mean}"
    )
    return Exhibit("loss", "Loss", caption, table, png(figure))


def _metrics(metrics: Mapping[str, Series], baselines: Numbers) -> Exhibit:
    """Each metric of the validation rows, beside what a constant prediction has."""
    names = list(metrics)[:MAX_METRICS]
    num_columns = min(len(names), 2)
    num_rows = math.ceil(len(names) / num_columns)
    figure, axes = plot(num_rows, num_columns, 2.2 * num_rows)
    table: dict[str, list[Any]] = {"metric": [], "step": [], "value": [], "constant": []}
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names, strict=False):
        steps, values = thin(*metrics[name])
        axis.plot(steps, values, color=color(0), linewidth=1.2, **_marked(steps))
        constant = baselines.get(name)
        if constant is not None:
            axis.axhline(constant, color=GREY, linestyle=":", label="a constant prediction")
            if name == names[0]:
                axis.legend(frameon=False, fontsize=7)
        axis.set_title(name, fontsize=9)
        table["metric"] += [name] * len(steps)
        table["step"] += steps.astype(int).tolist()
        table["value"] += rounded(values)
        table["constant"] += ["" if constant is None else constant] * len(steps)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    caption = "Of the validation rows, by step; dotted: the best prediction that knows no inputs."
    if left_out := list(metrics)[MAX_METRICS:]:
        caption += f" Not drawn: {', '.join(left_out)}."
    return Exhibit("metrics", "Metrics", caption, table, png(figure))


def _steps(train: Mapping[str, Series]) -> Exhibit:
    """Learning rate and gradient norm."""
    names = [name for name in ("learning_rate", "gradient_norm") if name in train]
    figure, axes = plot(len(names), 1)
    table: dict[str, list[Any]] = {"name": [], "step": [], "value": []}
    for axis, name in zip(axes[:, 0], names, strict=True):
        steps, values = thin(*train[name])
        axis.plot(steps, values, color=color(0), linewidth=1.0)
        axis.set_ylabel(name.replace("_", " "))
        if name == "gradient_norm" and len(values) and values.min() > 0:
            log_scale(axis)
        table["name"] += [name] * len(steps)
        table["step"] += steps.astype(int).tolist()
        table["value"] += rounded(values)
    figure.align_ylabels()
    axes[-1, 0].set_xlabel("step")
    caption = "The gradient's norm before it is clipped. One that grows without end diverges."
    return Exhibit("steps", "Learning rate and gradient norm", caption, table, png(figure))


def throughput(curves: Curves) -> list[Exhibit]:
    """Rows a second, and what the time goes to."""
    numbers = curves.throughput
    if "rows_per_second" not in numbers:
        return []
    figure, axes = plot(1, 2, 3.0)
    speed, bars = axes[0]
    seconds = numbers["seconds"][1]
    mean_speed = float(np.average(numbers["rows_per_second"][1], weights=seconds))
    steps, values = thin(*numbers["rows_per_second"])
    speed.plot(steps, values, color=color(0), linewidth=1.0, **_marked(steps))
    speed.set_ylim(bottom=0)
    speed.set_title("rows per second", fontsize=9)
    speed.set_xlabel("step")
    shares = {
        name.removeprefix(SHARE).replace("_", " "): float(np.average(share, weights=seconds))
        for name, (_, share) in numbers.items()
        if name.startswith(SHARE)
    }
    places = range(len(shares))
    bars.barh(places, [100 * share for share in shares.values()], color=color(0))
    bars.set_yticks(places, list(shares), fontsize=8)
    bars.invert_yaxis()
    bars.set_title("% of the first worker's time", fontsize=9)
    table = {"of": ["rows per second", *shares], "mean": rounded([mean_speed, *shares.values()])}
    caption = (
        "How fast the run trained, and what the first worker's time went to. Where workers differ, "
        "the faster ones wait in the exchange."
    )
    return [Exhibit("throughput", "Throughput", caption, table, png(figure))]


def _marked(steps: NDArray[np.float64]) -> dict[str, Any]:
    """How each of a few points is drawn."""
    return {"marker": "o", "markersize": 3} if len(steps) <= MAX_MARKED else {}


def thin(steps: NDArray[np.float64], values: NDArray[np.float64]) -> Series:
    """The line in at most `MAX_POINTS` points, each the mean of as many values."""
    if len(steps) <= MAX_POINTS:
        return steps, values
    bounds = np.linspace(0, len(steps), MAX_POINTS + 1).astype(int)
    counts = np.diff(bounds)
    means = np.add.reduceat(values, bounds[:-1]) / counts
    return steps[bounds[1:] - 1], means


def _add(lines: dict[str, Line], step: int, values: Numbers) -> None:
    for name, value in values.items():
        if value is not None:
            line = lines.setdefault(name, Line())
            line.steps.append(step)
            line.values.append(value)
