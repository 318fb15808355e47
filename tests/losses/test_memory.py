"""Weights and buffers that steps can write into, however a model has made them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.errors import UsageError
from pipeline.losses.memory import dense_gradients, own_memory


def with_buffer(buffer: torch.Tensor, persistent: bool = True) -> nn.Module:
    module = nn.Sequential(nn.Linear(2, 2))
    module[0].register_buffer("shift", buffer, persistent=persistent)
    return module


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize(
    "buffer",
    [
        torch.ones(1).expand(3),
        torch.tensor([1 + 2j]).conj(),
        torch.tensor([1 + 2j]).conj().imag,
    ],
    ids=["expanded", "conjugated", "negated"],
)
def test_a_buffer_gets_memory_of_its_own_and_keeps_its_numbers(
    buffer: torch.Tensor, persistent: bool
) -> None:
    module = with_buffer(buffer, persistent)
    before = buffer.clone()
    own_memory(module)
    after = module[0].shift  # type: ignore[index]
    assert torch.equal(after, before)
    assert not after.is_conj()
    assert not after.is_neg()
    assert ("0.shift" in module.state_dict()) == persistent
    after[0] = 7
    assert torch.equal(after[1:], before[1:]), "each number stands in memory once"


def test_a_parameter_that_repeats_a_number_is_refused_by_its_path() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    module[0].weight = nn.Parameter(torch.ones(1, 1).expand(2, 2))
    with pytest.raises(UsageError, match=r"parameter '0.weight' repeats numbers .*\.clone\(\)"):
        own_memory(module)


def test_a_tensor_of_one_row_repeats_nothing() -> None:
    module = with_buffer(torch.ones(3)[None].expand(1, 3))
    before = module[0].shift  # type: ignore[index]
    own_memory(module)
    assert module[0].shift is before  # type: ignore[index]


def test_the_gradient_of_an_embedding_is_dense_and_has_the_same_numbers() -> None:
    ids = torch.tensor([1, 1, 3])
    gradients = []
    for asked_for_dense in (False, True):
        torch.manual_seed(0)
        table = nn.Embedding(5, 2, sparse=True)
        if asked_for_dense:
            dense_gradients(table)
        table(ids).square().sum().backward()
        assert table.weight.grad is not None
        assert table.weight.grad.is_sparse != asked_for_dense
        gradients.append(table.weight.grad.to_dense())
    assert torch.equal(*gradients)
