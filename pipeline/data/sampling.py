"""How often each training row is drawn, where an epoch is not each row once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.cuts import names_rows
from pipeline.data.dataset import Dataset
from pipeline.errors import DataError
from pipeline.registry import nearest
from pipeline.spec.data import Sampling

MAX_CLASSES = 10_000
"""A column with more values than this has no classes to balance."""


def row_weights(
    train: Dataset, sampling: Sampling
) -> tuple[NDArray[np.float64], NDArray[np.int64] | None]:
    """How often each row is drawn beside the others, and its class where these are balanced: [N].

    Raises DataError for a column that is not one of classes.
    """
    if sampling.weights is not None:
        weights = _column(train, sampling.weights)
        if not weights.sum() > 0:
            text = f"data.sampling.weights: {sampling.weights!r} holds numbers too small to add up"
            raise DataError(text)
        return weights, None
    name = sampling.balance or ""
    where = f"data.sampling.balance: {name!r}"
    known = [*train.layout.slots, *train.lists]
    if name not in known:
        raise DataError(f"{where} is neither target nor input{nearest(name, known)}")
    if name in train.lists or train.layout.slots[name].shape:
        raise DataError(f"{where} has several values a row; name a column of classes")
    _, codes, counts = np.unique(_column(train, name), return_inverse=True, return_counts=True)
    if len(counts) > MAX_CLASSES or names_rows(len(counts), len(codes)):
        text = f"{len(counts):,} values in {len(codes):,} rows; name a column of classes"
        raise DataError(f"{where} has {text}")
    return (1 / counts)[codes], codes


def _column(train: Dataset, name: str) -> NDArray[np.float64]:
    parts = []
    for batch in train.parts([name]):
        column = batch[name]
        assert isinstance(column, Tensor)
        parts.append(column.numpy().astype(np.float64))  # a copy: parts share a buffer
    return np.concatenate(parts)
