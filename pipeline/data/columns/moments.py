"""Mean, deviation and range of numbers that come in parts."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pipeline.data.columns.base import Profile


class Moments:
    """Mean, deviation and range of numbers that come in parts (Chan et al., 1979).

    With `width` these are arrays [width], one for each position of the rows [N, width].
    """

    def __init__(self, width: int = 1) -> None:
        self.count = 0
        self.mean, self.squares = np.zeros(width), np.zeros(width)
        """`squares`: sum of the squared distances from the mean."""
        self.low = np.full(width, math.inf)
        self.high = np.full(width, -math.inf)

    def add(self, numbers: NDArray[np.float64]) -> None:
        """Take in some numbers [N], or rows [N, width]."""
        if not len(numbers):
            return
        rows = numbers.reshape(len(numbers), -1)
        with np.errstate(over="ignore", invalid="ignore"):  # too large: reported by `fit`
            mean = rows.mean(0)
            squares = ((rows - mean) ** 2).sum(0)
            total = self.count + len(rows)
            distance = mean - self.mean
            self.squares = self.squares + squares + distance**2 * self.count * len(rows) / total
            self.mean = self.mean + distance * len(rows) / total if self.count else mean
        self.low = np.minimum(self.low, rows.min(0))
        self.high = np.maximum(self.high, rows.max(0))
        self.count = total

    @property
    def deviation(self) -> NDArray[np.float64]:
        """Root of the mean squared distance; 1 for what is constant, which becomes 0."""
        if not self.count:
            return np.ones_like(self.mean)
        deviation = np.sqrt(self.squares / self.count)
        largest = np.maximum(np.abs(self.low), np.abs(self.high))
        return np.where(deviation <= 1e-12 * largest, 1.0, deviation)

    def profile(self) -> Profile:
        """Count, mean, deviation and range, over all positions."""
        if not self.count:
            return {"count": 0}
        mean = float(self.mean.mean())
        width = len(self.mean)
        between = self.count * float(((self.mean - mean) ** 2).sum())
        spread = math.sqrt((float(self.squares.sum()) + between) / (self.count * width))
        return {
            "count": self.count * width,
            "mean": mean,
            "deviation": spread,
            "min": float(self.low.min()),
            "max": float(self.high.max()),
        }
