"""One step, against torch's own loss, `backward` and optimizer on the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import registry
from pipeline.data.batch import Batch
from pipeline.data.columns import Category
from pipeline.distributed.ddp import OverlappedGradients
from pipeline.distributed.ordered import OrderedGradients
from pipeline.distributed.seeds import Seeds
from pipeline.errors import NonFiniteError
from pipeline.losses.contract import build
from pipeline.losses.objective import Objective
from pipeline.losses.terms import Term
from pipeline.train.step import Requests, train_step
from tests.batches import step_batch

WEIGHT = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
CUTS = [[0, 1, 2, 3, 4, 5, 6, 7], [0], [1, 2, 3], [4, 5, 6, 7]]
WAYS = [OrderedGradients, OverlappedGradients]


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)

    def forward(self, batch: Batch) -> Tensor:
        scores: Tensor = self.layer(batch["x"])
        return scores


def objective() -> Objective:
    loss = build(registry.losses["cross_entropy"], {"class_weight": WEIGHT.tolist()})
    field = Category("label", "int64", "target", vocabulary=(0, 1, 2))
    term = Term("class", 1.0, loss, ("prediction",), (field,))
    return Objective(Linear(), ["x"], [term], {"prediction": 3}).double()


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    label = torch.tensor([0, 1, 2, -100, 1, 1, -100, 0])
    return {"x": torch.randn(8, 4, generator=generator, dtype=torch.float64), "label": label}


def step(bound: Objective, rows: dict[str, Tensor], cuts: list[list[int]], **options: Any) -> Any:
    optimizer = torch.optim.SGD(bound.parameters(), lr=0.1)
    parts = [{name: value[part] for name, value in rows.items()} for part in cuts]
    way = options.pop("way", OrderedGradients)
    gradients = way(bound, Seeds(0, torch.device("cpu")))
    made = step_batch(bound, list(enumerate(parts)), len(parts))
    return train_step(bound, optimizer, gradients, made, **options)


@pytest.mark.parametrize("clip_norm", [None, 0.05])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cuts", [CUTS[:1], CUTS[1:]], ids=["whole", "micro-batches"])
def test_loss_and_weights_are_torchs_own(cuts: Any, way: Any, clip_norm: float | None) -> None:
    bound, plain, rows = objective(), objective(), batch()
    losses = step(bound, rows, cuts, way=way, clip_norm=clip_norm)
    loss = F.cross_entropy(plain.model(rows), rows["label"], WEIGHT)
    loss.backward()  # type: ignore[no-untyped-call]
    norm = nn.utils.clip_grad_norm_(plain.parameters(), clip_norm or float("inf"))
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    assert losses.total == pytest.approx(loss.item(), rel=1e-14)
    assert losses.terms == (losses.total,)
    assert losses.gradient_norm == pytest.approx(norm.item(), rel=1e-14)
    for parameter, expected in zip(bound.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("way", WAYS)
def test_a_step_that_is_not_finite_names_its_micro_batches_and_moves_nothing(way: Any) -> None:
    bound, rows = objective(), batch()
    rows["x"][4, 0] = float("inf")
    before = [parameter.detach().clone() for parameter in bound.parameters()]
    with pytest.raises(NonFiniteError) as raised:
        step(bound, rows, CUTS[1:], way=way)
    assert raised.value.step == 1
    assert list(raised.value.microbatches) == [2]
    skipped = step(bound, rows, CUTS[1:], way=way, skip_nonfinite=True)
    assert isinstance(skipped.nonfinite, NonFiniteError)
    assert all(map(torch.equal, bound.parameters(), before))


def test_a_batch_in_which_nothing_counts_has_no_loss_and_moves_nothing() -> None:
    bound, rows = objective(), batch()
    rows["label"][:] = -100
    before = [parameter.detach().clone() for parameter in bound.parameters()]
    losses = step(bound, rows, CUTS[1:])
    assert (losses.total, losses.terms, losses.gradient_norm) == (None, (None,), 0.0)
    assert all(map(torch.equal, bound.parameters(), before))


def test_what_a_worker_asks_for_comes_back_with_the_step() -> None:
    for asked in (Requests(), Requests(stop=True), Requests(save=True)):
        assert step(objective(), batch(), CUTS[1:], requests=asked).requests == asked
