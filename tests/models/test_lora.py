"""Low-rank adaptation: which weights move, and that the merged model computes the same."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from pipeline.models.lora import adapt, merged


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))


def test_an_adapted_layer_starts_as_it_was_and_trains_by_hand_computed_factors() -> None:
    plain, adapted = network(), network()
    layer: Any = adapted[0]
    adapt(layer, rank=2, alpha=6.0)
    rows = torch.randn(11, 6)
    assert torch.equal(plain(rows), adapted(rows))
    parts = layer.parametrizations.weight
    a, b = parts[0].lora_a, parts[0].lora_b
    assert (a.shape, b.shape) == ((2, 6), (5, 2))
    assert a.abs().max() <= 1 / math.sqrt(6)
    assert {name for name, p in adapted.named_parameters() if not p.requires_grad} == {
        "0.parametrizations.weight.original"
    }
    with torch.no_grad():
        b.normal_()
    first: Any = plain[0]
    wanted = rows @ (first.weight + 3.0 * b @ a).T + first.bias
    torch.testing.assert_close(layer(rows), wanted)
    layer(rows).square().sum().backward()
    for factor, gradient in zip(
        (a, b), torch.autograd.grad(wanted.square().sum(), (a, b)), strict=True
    ):
        torch.testing.assert_close(factor.grad, gradient)


def test_merged_weights_fit_the_plain_model_and_compute_the_same_bits() -> None:
    plain, adapted = network(), network()
    layers: list[Any] = [adapted[0], adapted[2]]
    for layer in layers:
        adapt(layer, rank=3, alpha=2.0)
        with torch.no_grad():
            layer.parametrizations.weight[0].lora_b.normal_()
    plain.load_state_dict(merged(adapted.state_dict(), rank=3, alpha=2.0))
    rows = torch.randn(9, 6)
    assert torch.equal(plain(rows), adapted(rows))


def test_other_parametrizations_are_left_alone() -> None:
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    weights = normed.state_dict()
    assert merged(weights, rank=3, alpha=2.0).keys() == weights.keys()
