"""One contract over every registered loss."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.batch import num_rows
from pipeline.losses.objective import Objective
from tests.conftest import built_in
from tests.losses.cases import Case, case

BUILT_IN = built_in("losses")
WHOLE = ["cox", "dice", "info_nce", "rmse", "supervised_contrastive", "triplet_batch_hard"]
ADDITIVE = sorted(set(BUILT_IN) - set(WHOLE))
SEEDS = st.integers(0, 10_000)
EXACT = 1e-12  # sums of some dozens of float64 numbers, in another order


def parts(made: Case, objective: Objective | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    objective = objective or made.objective()
    numerators, _ = objective(made.batch)
    return numerators[0], objective.denominators(made.batch)[0]


def oracle(made: Case, objective: Objective) -> torch.Tensor:
    term = objective.terms[0]
    return made.oracle(
        objective.head(0), *term.arguments(objective.predict(made.batch), made.batch)
    )


def test_every_torch_loss_is_registered() -> None:
    assert len(ADDITIVE) >= 23
    assert {"mse", "cross_entropy", "bce", "ctc", "adaptive_log_softmax"} <= set(BUILT_IN)


@pytest.mark.parametrize("name", BUILT_IN)
@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, rows=st.integers(3, 9))
def test_numerator_over_denominator_is_torchs_own_mean(name: str, seed: int, rows: int) -> None:
    made = case(name, seed, rows)
    objective = made.objective()
    numerator, denominator = parts(made, objective)
    expected = oracle(made, objective).detach()
    if float(denominator) == 0:
        assert float(numerator.detach()) == 0, "nothing counted"
        assert math.isnan(float(expected)), "torch divides by zero here"
    else:
        got = float(numerator.detach() / denominator)
        assert got == pytest.approx(float(expected), rel=EXACT, abs=EXACT)


@pytest.mark.parametrize("name", WHOLE)
def test_a_loss_of_the_whole_batch_is_declared_and_its_parts_do_not_add_up(name: str) -> None:
    made = case(name, 3, 8)
    objective = made.objective()
    assert objective.is_coupled
    whole = parts(made, objective)
    pieces = [made.rows(range(3)), made.rows(range(3, 8))]
    num = sum(float(objective(piece)[0][0]) for piece in pieces)
    assert num != pytest.approx(float(whole[0]), rel=1e-6)


@pytest.mark.parametrize("name", ADDITIVE)
@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, rows=st.integers(2, 9), cut=st.integers(0, 9))
def test_parts_of_a_batch_add_up_to_the_whole(name: str, seed: int, rows: int, cut: int) -> None:
    made = case(name, seed, rows)
    objective = made.objective()
    pieces = [made.rows(range(min(cut, rows))), made.rows(range(min(cut, rows), rows))]
    whole = parts(made, objective)
    num = sum(float(objective(piece)[0][0]) for piece in pieces if num_rows(piece))
    den = sum(float(objective.denominators(piece)[0]) for piece in pieces)
    assert num == pytest.approx(float(whole[0]), rel=1e-11, abs=1e-11)
    assert den == pytest.approx(float(whole[1]), rel=EXACT)


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_order_of_rows_does_not_matter(name: str) -> None:
    made = case(name, 3, 7)
    objective = made.objective()
    turned = made.rows(np.random.default_rng(0).permutation(7))
    assert float(objective(turned)[0][0]) == pytest.approx(float(objective(made.batch)[0][0]))
    assert float(objective.denominators(turned)[0]) == pytest.approx(float(parts(made)[1]))


@pytest.mark.parametrize("name", ADDITIVE)
def test_no_rows_give_zero_with_a_gradient_and_never_nan(name: str) -> None:
    made = case(name, 3, 4)
    objective = made.objective()
    nothing = made.rows([])
    numerators, recorded = objective(nothing)
    numerators.sum().backward()
    assert float(numerators[0]) == 0
    assert float(recorded[0]) == 0
    assert float(objective.denominators(nothing)[0]) == 0
    for parameter in objective.model.parameters():
        assert parameter.grad is None or not parameter.grad.any()


@pytest.mark.parametrize("name", ["cross_entropy", "nll", "linear_cross_entropy"])
def test_a_batch_of_ignored_items_gives_zero_over_zero_not_nan(name: str) -> None:
    made = next(
        made for seed in range(50)
        if "soft_targets" not in (made := case(name, seed, 3)).options
    )  # fmt: skip
    ignored = made.options.get("ignore_index", -100)
    made = replace(made, targets=(torch.full_like(made.targets[0], ignored),))  # type: ignore[arg-type]
    objective = made.objective()
    numerator, denominator = parts(made, objective)
    numerator.backward()  # type: ignore[no-untyped-call]
    assert float(numerator) == float(denominator) == 0
    grads = [p.grad for p in objective.parameters() if p.grad is not None]
    assert not any(bool(torch.isnan(g).any()) for g in grads)


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_gradient_is_the_numerators_own(name: str) -> None:
    made = case(name, 11, 3)
    objective = made.objective()

    def numerator(*values: torch.Tensor) -> torch.Tensor:
        names = [f"model.{n}" for n, _ in objective.model.named_parameters()]
        given = dict(zip(names, values, strict=True))
        result: torch.Tensor = torch.func.functional_call(objective, given, (made.batch,))[0]
        return result

    values = [p.detach().clone().requires_grad_() for p in objective.model.parameters()]
    assert torch.autograd.gradcheck(numerator, values, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_record_is_summed_in_float64_and_carries_no_gradient(name: str) -> None:
    made = case(name, 2, 5)
    objective = made.objective().float()
    batch = {n: c.float() if isinstance(c, torch.Tensor) and c.is_floating_point() else c
             for n, c in made.batch.items()}  # fmt: skip
    numerators, recorded = objective(batch)
    assert numerators.dtype == torch.float32
    assert recorded.dtype == torch.float64
    assert not recorded.requires_grad
    assert float(recorded[0]) == pytest.approx(float(numerators[0]), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", BUILT_IN)
def test_what_is_served_is_on_the_targets_scale(name: str) -> None:
    made = case(name, 4, 6)
    objective = made.objective()
    term = objective.terms[0]
    with torch.no_grad():
        served = term.served(objective.head(0), objective.predict(made.batch))
    assert bool(torch.isfinite(served).all())
    kind = term.loss.roles[0].kind
    if kind in ("logits", "log_probabilities", "probabilities") or term.loss.head:
        assert float(served.min()) >= 0
        assert float(served.max()) <= 1 + 1e-9
    if term.loss.shape == "classes" and term.loss.link is not None:
        torch.testing.assert_close(served.sum(1), torch.ones_like(served.sum(1)))
