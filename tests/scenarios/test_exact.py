"""Gradient and loss of a step are those of the global batch, whoever computes which part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline import registry
from pipeline.data.batch import Batch
from pipeline.data.columns import Category, Number
from pipeline.data.partition import split_batch, worker_range
from pipeline.distributed import ordered as fixed_order
from pipeline.distributed.ddp import OverlappedGradients
from pipeline.distributed.gradients import Gradients
from pipeline.distributed.ordered import OrderedGradients
from pipeline.distributed.seeds import Seeds
from pipeline.errors import NonFiniteError
from pipeline.losses.contract import build
from pipeline.losses.objective import Objective
from pipeline.losses.terms import Term
from pipeline.spec.data import SampleWeight
from pipeline.train.step import StepLosses, train_step
from pipeline.train.weights import weights_sha256
from tests.batches import step_batch
from tests.conftest import built_in
from tests.losses.cases import case
from tests.processes import on_workers

EXACT = 1e-12  # float64; sums of a few dozen numbers in another order
BUILT_IN = built_in("losses")
NUM_ROWS = 11
SEEDS = Seeds(0, torch.device("cpu"))

# Per worker, the rows of its micro-batches. The first two rows hold nothing that counts for losses
# with ignored items; with three workers one has only those, and with five one has no rows at all.
SPLITS: dict[int, list[list[list[int]]]] = {
    1: [[[0, 1], [2, 3, 4, 5], [6], [7, 8, 9, 10]]],
    2: [[[0, 1, 2, 3], [4], [5, 6]], [[7, 8, 9, 10]]],
    3: [[[0, 1]], [[2, 3, 4, 5, 6], [7]], [[8, 9, 10]]],
    5: [[[0, 1]], [[2]], [], [[3, 4, 5, 6, 7, 8], [9]], [[10]]],
}


class Recorder(torch.optim.SGD):
    """Keeps the gradients it was given and leaves the weights alone."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        gradients = [p.grad for g in self.param_groups for p in g["params"]]
        self.seen = [None if gradient is None else gradient.clone() for gradient in gradients]


def gradients_of(objective: Objective, ordered: bool) -> Gradients:
    way = OrderedGradients if ordered else OverlappedGradients
    return way(objective, SEEDS)


@dataclass
class Outcome:
    losses: StepLosses
    gradients: list[Tensor | None]

    def assert_torchs_own(self, objective: nn.Module) -> None:
        """The gradients of the reference after a backward pass; none where that has none."""
        for gradient, parameter in zip(self.gradients, objective.parameters(), strict=True):
            assert (gradient is None) == (parameter.grad is None)
            if gradient is not None:
                torch.testing.assert_close(gradient, parameter.grad, rtol=EXACT, atol=EXACT)

    def assert_bits(self, other: Outcome) -> None:
        assert self.losses == other.losses
        for one, another in zip(self.gradients, other.gradients, strict=True):
            assert (one is None) == (another is None)
            assert one is None or another is None or torch.equal(one, another)


def one_step(
    objective: Objective,
    rows: Callable[[list[int]], Batch],
    rank: int,
    num: int,
    clip_norm: float | None = None,
) -> Outcome:
    recorder = Recorder(objective.parameters(), lr=1.0)
    first = sum(len(parts) for parts in SPLITS[num][:rank])
    own = [(first + i, rows(part)) for i, part in enumerate(SPLITS[num][rank])]
    gradients = OverlappedGradients(objective, SEEDS)
    batch = step_batch(objective, own, sum(map(len, SPLITS[num])))
    losses = train_step(objective, recorder, gradients, batch, clip_norm=clip_norm)
    return Outcome(losses, recorder.seen)


def one_ordered_step(
    objective: Objective, rows: Callable[[list[int]], Batch], rank: int, num: int
) -> Outcome:
    recorder = Recorder(objective.parameters(), lr=1.0)
    pieces = SPLITS[1][0]
    own = [(i, rows(pieces[i])) for i in worker_range(len(pieces), rank, num)]
    gradients, batch = OrderedGradients(objective, SEEDS), step_batch(objective, own, len(pieces))
    losses = train_step(objective, recorder, gradients, batch)
    return Outcome(losses, recorder.seen)


def every_loss(rank: int, num: int) -> dict[str, list[list[Outcome]]]:
    found: dict[str, list[list[Outcome]]] = {}
    for name in BUILT_IN:
        for seed in (1, 2, 3):
            made = case(name, seed, NUM_ROWS)
            found.setdefault(name, []).append(
                [
                    one_step(made.objective(), made.rows, rank, num),
                    one_ordered_step(made.objective(), made.rows, rank, num),
                ]
            )
    return found


@cache
def outcomes(num: int) -> list[dict[str, list[list[Outcome]]]]:
    return [every_loss(0, 1)] if num == 1 else on_workers(num, every_loss)


@pytest.mark.parametrize("num", [1, 2, 3, 5])
@pytest.mark.parametrize("name", BUILT_IN)
def test_any_split_gives_the_gradient_and_loss_of_torchs_own_mean(name: str, num: int) -> None:
    for index, seed in enumerate((1, 2, 3)):
        made = case(name, seed, NUM_ROWS)
        reference = made.objective()
        arguments = reference.terms[0].arguments(reference.predict(made.batch), made.batch)
        expected = made.oracle(reference.head(0), *arguments)
        expected.backward()  # type: ignore[no-untyped-call]
        for worker in outcomes(num):
            for got in worker[name][index]:
                loss = float(expected.detach())
                assert got.losses.total == pytest.approx(loss, rel=EXACT, abs=EXACT)
                got.assert_torchs_own(reference)


@pytest.mark.parametrize("num", [2, 3, 5])
@pytest.mark.parametrize("name", BUILT_IN)
def test_the_fixed_order_gives_the_same_bits_on_any_number_of_workers(name: str, num: int) -> None:
    for index in range(3):
        alone = outcomes(1)[0][name][index][1]
        for worker in outcomes(num):
            worker[name][index][1].assert_bits(alone)


class TwoHeads(nn.Module):
    """Two outputs and a parameter that no loss reads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.classes, self.amount = nn.Linear(3, 4), nn.Linear(3, 1)
        self.idle = nn.Parameter(torch.ones(2))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features = batch["features"]
        assert isinstance(features, Tensor)
        return {"classes": self.classes(features), "amount": self.amount(features).squeeze(1)}


def two_terms() -> tuple[Objective, Batch]:
    torch.manual_seed(0)
    batch: Batch = {
        "features": torch.randn(NUM_ROWS, 3, dtype=torch.float64),
        "label": torch.tensor([-100, -100, 2, 1, 0, 3, -100, 2, 2, -100, 1]),
        "price": torch.randn(NUM_ROWS, dtype=torch.float64),
    }
    weight = [0.5, 2.0, 0.1, 3.0]
    label = Category("label", "int64", "target", vocabulary=(0, 1, 2, 3))
    price = Number("price", "double", "target")
    classes = build(registry.losses["cross_entropy"], {"class_weight": weight})
    amount = build(registry.losses["huber"], {"delta": 0.5})
    terms = [
        Term("classes", 0.3, classes, ("classes",), (label,)),
        Term("amount", 2.0, amount, ("amount",), (price,)),
    ]
    return Objective(
        TwoHeads(), ["features"], terms, {"classes": 4, "amount": None}
    ).double(), batch


def two_weighted_terms(rank: int, num: int) -> Outcome:
    objective, batch = two_terms()
    return one_step(objective, lambda rows: {k: v[rows] for k, v in batch.items()}, rank, num)  # type: ignore[index]


@pytest.mark.parametrize("num", [2, 3, 5])
def test_two_weighted_terms_divide_by_their_own_counts(num: int) -> None:
    objective, batch = two_terms()
    made = objective.predict(batch)
    weight = torch.tensor([0.5, 2.0, 0.1, 3.0], dtype=torch.float64)
    cross = nn.functional.cross_entropy(made["classes"], batch["label"], weight)  # type: ignore[arg-type]
    huber = nn.functional.huber_loss(made["amount"], batch["price"], delta=0.5)  # type: ignore[arg-type]
    (0.3 * cross + 2.0 * huber).backward()  # type: ignore[no-untyped-call]
    for got in on_workers(num, two_weighted_terms):
        assert got.losses.terms == pytest.approx((float(cross), float(huber)), rel=EXACT)
        assert got.losses.total == pytest.approx(0.3 * float(cross) + 2 * float(huber), rel=EXACT)
        got.assert_torchs_own(objective)


def test_a_term_without_any_item_is_absent_and_the_others_train() -> None:
    objective, batch = two_terms()
    batch = {**batch, "label": torch.full((NUM_ROWS,), -100)}
    got = one_step(objective, lambda rows: {k: v[rows] for k, v in batch.items()}, 0, 1)  # type: ignore[index]
    assert got.losses.terms[0] is None
    assert got.losses.terms[1] is not None
    assert got.losses.total == pytest.approx(2.0 * got.losses.terms[1])


def plain_mean(rank: int, num: int) -> list[Tensor]:
    """What DDP does by itself: each worker's own mean, then the mean of these."""
    made = case("cross_entropy", 2, NUM_ROWS)
    objective = made.objective()
    rows = [row for part in SPLITS[num][rank] for row in part]
    wrapped = nn.parallel.DistributedDataParallel(objective)
    numerators, _ = wrapped(made.rows(rows))
    (numerators[0] / objective.denominators(made.rows(rows))[0].clamp(min=1e-9)).backward()
    return [p.grad for p in objective.parameters() if p.grad is not None]


def test_the_comparison_can_see_a_mean_of_means() -> None:
    made = case("cross_entropy", 2, NUM_ROWS)
    reference = made.objective()
    arguments = reference.terms[0].arguments(reference.predict(made.batch), made.batch)
    made.oracle(None, *arguments).backward()  # type: ignore[no-untyped-call]
    (wanted,) = [p.grad for p in reference.parameters()]
    assert wanted is not None
    (gradient,) = on_workers(3, plain_mean)[0]
    assert float((gradient - wanted).norm() / wanted.norm()) > 0.01


def not_finite_on_one_worker(rank: int, num: int) -> tuple[str, list[Tensor]]:
    objective, batch = two_terms()
    assert isinstance(batch["price"], Tensor)
    batch["price"][10] = torch.inf  # the last worker's row
    before = [p.detach().clone() for p in objective.parameters()]
    try:
        one_step(objective, lambda rows: {k: v[rows] for k, v in batch.items()}, rank, num)  # type: ignore[index]
    except NonFiniteError as error:
        after = list(objective.parameters())
        return str(error), [a.detach() - b for a, b in zip(after, before, strict=True)]
    return "", []


def test_a_loss_that_is_not_finite_stops_every_worker_before_the_weights_move() -> None:
    for message, moved in on_workers(3, not_finite_on_one_worker):
        assert "step 1" in message
        assert "amount = inf" in message
        assert not any(bool(change.any()) for change in moved)


def clipped(rank: int, num: int) -> Outcome:
    objective, batch = two_terms()
    return one_step(objective, lambda rows: {k: v[rows] for k, v in batch.items()}, rank, num, 0.01)  # type: ignore[index]


def test_clipping_sees_the_whole_gradient() -> None:
    alone = clipped(0, 1)
    assert alone.losses.gradient_norm > 0.01
    for got in on_workers(3, clipped):
        assert got.losses.gradient_norm == pytest.approx(alone.losses.gradient_norm, rel=EXACT)
        for one, other in zip(got.gradients, alone.gradients, strict=True):
            if one is None or other is None:
                assert one is other
            else:
                torch.testing.assert_close(one, other, rtol=EXACT, atol=EXACT)


class Scaled(nn.Module):
    """InfoNCE whose temperature is trained, as a user would write it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        logits = self.scale.exp() * first @ second.T
        return nn.functional.cross_entropy(logits, torch.arange(len(logits)))


def with_trained_temperature() -> tuple[Objective, Batch]:
    made = case("info_nce", 1, NUM_ROWS)
    before = made.objective()
    module = Scaled()
    own = replace(before.terms[0].loss, items=module, module=module)
    objective = Objective(
        before.model, ["features"], [replace(before.terms[0], loss=own)], before.sizes
    )
    return objective.double(), made.batch


def scaled(rank: int, num: int) -> Outcome:
    objective, batch = with_trained_temperature()
    return one_step(objective, lambda rows: {k: v[rows] for k, v in batch.items()}, rank, num)  # type: ignore[index]


@pytest.mark.parametrize("num", [1, 2, 3, 5])
def test_parameters_of_a_loss_of_the_whole_batch_are_trained_once(num: int) -> None:
    objective, batch = with_trained_temperature()
    made = objective.predict(batch)
    expected = objective.heads["0"](made["first"], made["second"])
    expected.backward()
    for got in [scaled(0, 1)] if num == 1 else on_workers(num, scaled):
        assert got.losses.total == pytest.approx(float(expected.detach()), rel=EXACT)
        got.assert_torchs_own(objective)


def weighted(mean_over: str, rank: int, num: int) -> Outcome:
    objective, batch = two_weighted(mean_over)
    return one_step(objective, lambda rows: {k: v[rows] for k, v in batch.items()}, rank, num)  # type: ignore[index]


def two_weighted(mean_over: Any) -> tuple[Objective, Batch]:
    objective, batch = two_terms()
    generator = torch.Generator().manual_seed(5)
    importance = torch.rand(NUM_ROWS, generator=generator, dtype=torch.float64) * 3
    batch = {**batch, "importance": importance}
    objective.sample_weight = SampleWeight(column="importance", mean_over=mean_over)
    return objective, batch


@pytest.mark.parametrize("num", [1, 2, 3, 5])
@pytest.mark.parametrize("mean_over", ["weights", "items"])
def test_rows_weighted_by_a_column_are_a_weighted_mean_of_the_global_batch(
    num: int, mean_over: str
) -> None:
    objective, batch = two_weighted(mean_over)
    made = objective.predict(batch)
    labels, weight = batch["label"], batch["importance"]
    assert isinstance(labels, Tensor)
    assert isinstance(weight, Tensor)
    class_weight = torch.tensor([0.5, 2.0, 0.1, 3.0], dtype=torch.float64)
    each = nn.functional.cross_entropy(made["classes"], labels, class_weight, reduction="none")
    counted = class_weight[labels.clamp(min=0)] * (labels != -100)
    errors = nn.functional.huber_loss(made["amount"], batch["price"], delta=0.5, reduction="none")  # type: ignore[arg-type]
    divisors = (counted * weight).sum(), weight.sum()
    if mean_over == "items":
        divisors = counted.sum(), torch.tensor(float(NUM_ROWS))
    terms = (each * weight).sum() / divisors[0], (errors * weight).sum() / divisors[1]
    (0.3 * terms[0] + 2.0 * terms[1]).backward()  # type: ignore[no-untyped-call]
    work = partial(weighted, mean_over)
    for got in [work(0, 1)] if num == 1 else on_workers(num, work):
        assert got.losses.terms == pytest.approx([float(t.detach()) for t in terms], rel=EXACT)
        got.assert_torchs_own(objective)


class Sensitive(nn.Module):
    """Dropout, running statistics, and sums long enough for their order to show.

    One buffer is constant and huge, one is replaced by a new tensor in each forward pass, and one
    counts down.
    """

    average: Tensor
    left: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.layers = nn.Sequential(
            nn.Linear(6, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 4)
        )
        self.register_buffer("least", torch.full((3,), torch.finfo(torch.float32).min))
        self.register_buffer("average", torch.zeros(4))
        self.register_buffer("left", torch.tensor(1000, dtype=torch.int16))

    def forward(self, batch: Batch) -> Tensor:
        made: Tensor = self.layers(batch["features"])
        if self.training:
            self.left -= 1
            self.average = 0.9 * self.average + 0.1 * made.detach().mean(0)
        return made + 0.1 * self.average


def twenty_steps(
    num_microbatches: int, ordered: bool, rank: int, num: int
) -> tuple[str, list[Any]]:
    """SHA-256 of the state and the losses of 20 Adam steps, clipped, with a ragged last part."""
    label = Category("label", "int64", "target", vocabulary=(0, 1, 2, 3))
    weight = [0.5, 2.0, 0.1, 3.0]
    loss = build(registry.losses["cross_entropy"], {"class_weight": weight})
    term = Term("classes", 1.0, loss, ("prediction",), (label,))
    objective = Objective(Sensitive(), ["features"], [term], {"prediction": 4})
    gradients = gradients_of(objective, ordered)
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(3)
    num_rows = 8 * num_microbatches - 3
    losses = []
    for step in range(20):
        features = torch.randn(num_rows, 6, generator=generator)
        labels = torch.randint(0, 4, (num_rows,), generator=generator)
        pieces = split_batch(np.arange(num_rows), 8 if ordered else None, num)
        own: list[Any] = [
            (i, {"features": features[pieces[i]], "label": labels[pieces[i]]})
            for i in worker_range(len(pieces), rank, num)
        ]
        batch = step_batch(objective, own, len(pieces), step)
        losses.append(train_step(objective, optimizer, gradients, batch, clip_norm=1.0))
    return weights_sha256(objective.state_dict()), losses


def all_runs(rank: int, num: int) -> list[tuple[str, list[Any]]]:
    in_order = [twenty_steps(m, True, rank, num) for m in (2, 5, 8, 11)]
    fixed_order.SMALL = 0  # segments, as large models have them
    in_order += [twenty_steps(m, True, rank, num) for m in (5, 11)]
    return [*in_order, twenty_steps(8, False, rank, num)]


@cache
def trained_on(num: int) -> list[list[tuple[str, list[Any]]]]:
    return on_workers(num, all_runs)  # with one worker too: threads are part of the bits


@pytest.mark.parametrize("num", [2, 3, 4, 5])
def test_weights_statistics_and_curve_have_the_same_bits_after_twenty_steps(num: int) -> None:
    (alone,) = trained_on(1)
    for got in trained_on(num):
        assert got[:-1] == alone[:-1]


@pytest.mark.parametrize("ordered", [True, False])
def test_a_buffer_that_no_forward_pass_changes_keeps_its_bits(ordered: bool) -> None:
    label = Category("label", "int64", "target", vocabulary=(0, 1, 2, 3))
    term = Term("c", 1.0, build(registry.losses["cross_entropy"], {}), ("prediction",), (label,))
    objective = Objective(Sensitive(), ["features"], [term], {"prediction": 4})
    gradients = gradients_of(objective, ordered)
    batch: Any = {"features": torch.randn(9, 6), "label": torch.arange(9) % 4}
    own: Any = [(i, {k: v[i * 3 : i * 3 + 3] for k, v in batch.items()}) for i in range(3)]
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    for step in range(3):
        train_step(objective, optimizer, gradients, step_batch(objective, own, 3, step))
    model: Any = objective.model
    assert bool((model.least == torch.finfo(torch.float32).min).all())
    assert bool(model.average.any())


def test_the_comparison_of_bits_can_see_another_order() -> None:
    (alone,) = trained_on(1)
    first, *others = trained_on(3)
    assert first[-1][0] != alone[-1][0]
    assert all(other[-1] == first[-1] for other in others), "workers agree with each other"


@pytest.mark.parametrize("ordered", [True, False])
def test_a_step_that_is_left_out_leaves_no_trace(ordered: bool) -> None:
    label = Category("label", "int64", "target", vocabulary=(0, 1, 2, 3))
    term = Term("c", 1.0, build(registry.losses["cross_entropy"], {}), ("prediction",), (label,))
    objective = Objective(Sensitive(), ["features"], [term], {"prediction": 4})
    gradients = gradients_of(objective, ordered)
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.1)
    batch: Any = {"features": torch.randn(9, 6), "label": torch.arange(9) % 4}
    own: Any = [(i, {k: v[i * 3 : i * 3 + 3] for k, v in batch.items()}) for i in range(3)]

    def stepped(step: int, skip_nonfinite: bool) -> Any:
        batch = step_batch(objective, own, 3, step)
        return train_step(
            objective, optimizer, gradients, batch, clip_norm=1.0, skip_nonfinite=skip_nonfinite
        )

    assert stepped(0, True).nonfinite is None
    before = weights_sha256(objective.state_dict()), str(optimizer.state_dict())
    own[1][1]["features"][0, 0] = torch.nan
    found = stepped(1, True)
    assert 1 in found.nonfinite.microbatches
    assert (weights_sha256(objective.state_dict()), str(optimizer.state_dict())) == before
    with pytest.raises(NonFiniteError):
        stepped(1, False)
