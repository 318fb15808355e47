"""What a curve comes to, known as soon as its last line is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipeline.rundir.journal import CurveDigest, Reader
from pipeline.rundir.records import Numbers, Point

RISE = 0.1
"""Of the lowest validation loss, from which on it is worth a word."""


class CurveEnd:
    """The last loss, metrics and notes of a journal, and its SHA-256; points are added in order."""

    def __init__(self, since: float = 0.0) -> None:
        """`since`: the time, in seconds since 1970, from which on steps are new."""
        self._since, self._digest = since, CurveDigest()
        self.loss: float | None = None
        """Of the last step."""
        self.metrics: Numbers = {}
        """Of the last evaluation, its losses too."""
        self.baselines: Numbers = {}
        """The metrics that a constant prediction has."""
        self.evaluated = 0
        """The step of the last evaluation."""
        self.notes: dict[int, list[str]] = {}
        """What an evaluation's numbers do not show, by its step."""
        self.lowest: tuple[int, float] | None = None
        """The step with the lowest validation loss, and that loss."""
        self.first_new: float | None = None
        """When the first new step was done, in seconds since 1970."""

    @property
    def sha256(self) -> str:
        """Of the losses so far."""
        return self._digest.hexdigest()

    @property
    def overfitting(self) -> str:
        """That the validation loss has risen again, by a tenth or more; or nothing."""
        last = self.metrics.get("loss")
        if last is None or self.lowest is None:
            return ""
        step, loss = self.lowest
        if last - loss <= RISE * abs(loss):
            return ""
        return f"validation loss was lowest after step {step:,}: {loss:.4g}, and is {last:.4g} now"

    def add(self, point: Point) -> None:
        """Take in the next point."""
        self._digest.add(point)
        if "train" in point:
            self.loss = point["train"]["loss"]
            if self.first_new is None and point["time"] / 1000 >= self._since:
                self.first_new = point["time"] / 1000
        elif "validation" in point:
            self.metrics = point["validation"]
            loss = self.metrics.get("loss")
            if loss is not None and (self.lowest is None or loss < self.lowest[1]):
                self.lowest = point["step"], loss
            self.baselines = point.get("baselines", self.baselines)
            self.evaluated = point["step"]
            self.notes[self.evaluated] = list(point.get("notes", []))


class EndReader(Reader):
    """Reads a journal, and knows what it has come to."""

    def __init__(self, path: Path, since: float = 0.0) -> None:
        super().__init__(path)
        self._since = since
        self._end = CurveEnd(since)

    def new(self) -> Iterator[Point]:
        """Points that were completed since the last call."""
        for point in super().new():
            self._end.add(point)
            yield point

    def read_end(self) -> CurveEnd:
        """What all of the journal comes to."""
        for _ in self.new():
            pass
        if self.num_files <= 1:
            return self._end
        # a repair cut off lines that were read here: those that took their place count
        again = EndReader(self.path, self._since)
        return again.read_end()
