"""Weights in a file and as a hash."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from pipeline.train.weights import load_weights, save_weights, take_weights, to_cpu, weights_sha256


def test_what_is_saved_is_loaded_again(tmp_path: Path) -> None:
    weights = {"a": torch.randn(3, 2), "b": torch.tensor(7), "c": torch.randn(2).bfloat16()}
    with (tmp_path / "weights.pt").open("wb") as file:
        save_weights(weights, file)
    loaded = load_weights(tmp_path / "weights.pt")
    assert list(loaded) == list(weights)
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_the_hash_is_that_of_numbers_and_not_of_memory() -> None:
    matrix = torch.randn(3, 4)
    sha256 = weights_sha256({"a": matrix, "b": torch.zeros(0)})
    assert weights_sha256({"b": torch.zeros(0), "a": matrix.T.contiguous().T}) == sha256
    assert weights_sha256({"a": matrix.to_sparse(), "b": torch.zeros(0)}) == sha256


def test_the_hash_sees_a_bit_a_name_a_type_and_a_shape() -> None:
    number = torch.tensor([1.0])
    bit = torch.nextafter(number, torch.tensor([2.0]))
    others = [{"a": bit}, {"b": number}, {"a": number.double()}, {"a": number[0]}]
    hashes = {weights_sha256(weights) for weights in [{"a": number}, *others]}
    assert len(hashes) == 5
    assert weights_sha256({"a": torch.tensor([0.0])}) != weights_sha256({"a": torch.tensor([-0.0])})


def test_a_copy_on_the_cpu_is_one_that_steps_do_not_change() -> None:
    parameter = nn.Parameter(torch.ones(2))
    state = to_cpu({"step": 3, "groups": [{"lr": 0.1, "momentum": parameter}]})
    parameter.data += 1
    assert torch.equal(state["groups"][0]["momentum"], torch.ones(2))
    assert not state["groups"][0]["momentum"].requires_grad
    assert state["step"] == 3


def test_a_buffer_that_has_grown_finds_its_place() -> None:
    grown, fresh = (nn.BatchNorm1d(2) for _ in range(2))
    grown.register_buffer("cache", torch.arange(5.0))
    fresh.register_buffer("cache", torch.zeros(0))
    take_weights(fresh, grown.state_dict())
    assert torch.equal(fresh.get_buffer("cache"), torch.arange(5.0))
    grown.get_buffer("cache").add_(1)
    assert torch.equal(fresh.get_buffer("cache"), torch.arange(5.0)), "a copy"
