"""What a curve's last bits depend on is named, and torch is held to it."""

from __future__ import annotations

import pytest
import torch

from pipeline.spec import load
from pipeline.train.determinism import deterministic, fingerprint, fingerprint_sha256
from tests.conftest import JOBS


def test_with_micro_batches_the_number_of_workers_is_no_part_of_it() -> None:
    job = JOBS / "diabetes.yaml"
    one, three = (load(job, {"training.microbatch_size": 8, "workers.num": num}) for num in (1, 3))
    assert fingerprint_sha256(one) == fingerprint_sha256(three)
    assert fingerprint(one)["torch"] == torch.__version__
    one, three = (load(job, {"workers.num": num}) for num in (1, 3))
    assert fingerprint_sha256(one) != fingerprint_sha256(three)


@pytest.mark.parametrize(
    "change",
    [
        {"training.microbatch_size": 4},
        {"training.precision": "float64"},
        {"workers.cpus_per_worker": 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_changes_the_bits_changes_the_fingerprint(change: dict[str, object]) -> None:
    before = {"training.microbatch_size": 8, "workers.cpus_per_worker": 1}
    job = JOBS / "diabetes.yaml"
    assert fingerprint_sha256(load(job, before)) != fingerprint_sha256(load(job, before | change))


def test_operations_whose_bits_differ_are_refused_while_it_holds() -> None:
    def draw() -> torch.Tensor:  # without an implementation that gives the same bits
        return torch.bincount(torch.ones(3, dtype=torch.long), torch.ones(3))

    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic(wanted=True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
        draw()  # CPUs have one
    with pytest.raises(ZeroDivisionError), deterministic(wanted=True):
        raise ZeroDivisionError
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic(wanted=False):
        assert not torch.are_deterministic_algorithms_enabled()
