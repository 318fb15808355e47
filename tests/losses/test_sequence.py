"""CTC of a sequence so short that its alignments can be listed."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline import registry
from pipeline.data.batch import Ragged
from pipeline.losses.contract import build


def test_ctc_sums_over_all_alignments() -> None:
    """Two positions, a blank and one token: it stands at the first, the second, or both."""
    blank, token = [0.3, 0.6], [0.7, 0.4]
    prediction = torch.tensor([[blank, token]], dtype=torch.float64).log()
    loss = build(registry.losses["ctc"], {})
    target = Ragged(torch.tensor([[1]]), torch.tensor([1]))
    probability = 0.7 * 0.6 + 0.3 * 0.4 + 0.7 * 0.4
    assert float(loss.items(prediction, target)) == pytest.approx(-math.log(probability))


def test_ctc_is_divided_by_the_length_of_the_target() -> None:
    """Two positions for two tokens can be aligned in one way."""
    prediction = torch.tensor([[[0.2, 0.1], [0.5, 0.3], [0.3, 0.6]]], dtype=torch.float64).log()
    loss = build(registry.losses["ctc"], {})
    target = Ragged(torch.tensor([[1, 2]]), torch.tensor([2]))
    assert float(loss.items(prediction, target)) == pytest.approx(-math.log(0.5 * 0.6) / 2)
