"""Errors of gradient and reported loss against one float64 process: ours, and plain DDP.

Both train the same float32 model on the same rows, spread over gloo workers. "Plain DDP" is what
its documentation shows: each worker's own `reduction="mean"`, divided by its number of
micro-batches, gradients averaged by DDP, and the mean of the workers' losses reported.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import registry
from pipeline.data.batch import Batch
from pipeline.data.columns import Category, Field, Number
from pipeline.distributed.ddp import OverlappedGradients
from pipeline.distributed.seeds import Seeds
from pipeline.losses.contract import build
from pipeline.losses.objective import Objective
from pipeline.losses.terms import Term
from pipeline.spec.data import SampleWeight
from pipeline.train.step import train_step
from tests.batches import step_batch
from tests.benchmarks.harness import Result
from tests.processes import on_workers

ROUNDS = 1
CPU = torch.device("cpu")
WEIGHT = [0.2, 5.0, 1.0, 0.5]
IGNORED = -100


@dataclass(frozen=True)
class Case:
    """A loss, and how many rows each micro-batch of each worker has."""

    name: str
    split: list[list[int]]
    terms: str = "classes"
    options: tuple[tuple[str, Any], ...] = ()
    ignored: tuple[int, int] | None = None
    """Rows from, to that hold an ignored class."""
    weighted: bool = False
    """Rows have weights of their own, whose sum divides."""


CASES = [
    Case("even", [[8], [8]]),
    Case("ragged 7 + 6", [[7], [6]]),
    Case("class weights", [[8], [8]], options=(("class_weight", WEIGHT),)),
    Case("ignore_index, 14 and 2 counted", [[16], [16]], ignored=(16, 30)),
    Case("BCE with pos_weight, ragged", [[9], [4]], "binary", (("pos_weight", 3.0),)),
    Case("four unequal micro-batches", [[5, 1, 3, 7], [2, 8, 4, 2]]),
    Case("a worker with nothing that counts", [[8], [8]], ignored=(8, 16)),
    Case(
        "sample weights and pos_weight, ragged",
        [[9], [4]],
        "binary",
        (("pos_weight", 3.0),),
        weighted=True,
    ),
    Case("info_nce, a loss of the whole batch", [[7], [6]], "pairs"),
    Case("two weighted terms", [[7], [6]], "both", (("class_weight", WEIGHT),), ignored=(7, 12)),
]


class Model(nn.Module):
    """Two outputs over eight features."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.classes = nn.Linear(8, 16), nn.Linear(16, 4)
        self.amount = nn.Linear(16, 1)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features = batch["features"]
        assert isinstance(features, Tensor)
        hidden = self.shared(features).tanh()
        classes = self.classes(hidden)
        return {
            "classes": classes,
            "amount": self.amount(hidden).squeeze(1),
            "first": classes[:, :2],
            "second": classes[:, 2:],
        }


def rows(case: Case, kind: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """All rows of the global batch."""
    generator = torch.Generator().manual_seed(1)
    number = sum(map(sum, case.split))
    label = torch.randint(0, 4, (number,), generator=generator)
    if case.ignored:
        label[slice(*case.ignored)] = IGNORED
    return {
        "features": torch.randn(number, 8, generator=generator).to(kind),
        "label": label,
        "price": torch.randn(number, generator=generator).to(kind),
        "importance": (3 * torch.rand(number, generator=generator) ** 3).to(kind),
        "yes": (torch.rand(number, generator=generator) > 0.7).to(kind),
    }


def mean(case: Case, made: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    """Torch's own mean of the case's loss."""
    options = dict(case.options)
    if case.terms == "binary":
        pos = made["amount"].new_tensor(options["pos_weight"])
        each = F.binary_cross_entropy_with_logits(
            made["amount"], batch["yes"], pos_weight=pos, reduction="none"
        )
        counted = batch["importance"] if case.weighted else torch.ones_like(each)
        return (each * counted).sum() / counted.sum()
    if case.terms == "pairs":
        first, second = (F.normalize(part, dim=1) for part in made["classes"].split(2, dim=1))  # type: ignore[no-untyped-call]
        cosines = first @ second.T / 0.07
        partner = torch.arange(len(cosines))
        return (F.cross_entropy(cosines, partner) + F.cross_entropy(cosines.T, partner)) / 2
    weight = options.get("class_weight")
    tensor = None if weight is None else made["classes"].new_tensor(weight)
    loss = F.cross_entropy(made["classes"], batch["label"], tensor)
    if case.terms == "both":
        loss = loss + 2.0 * F.huber_loss(made["amount"], batch["price"])
    return loss


def terms(case: Case) -> list[Term]:
    """The same loss as ours."""

    def term(name: str, output: str, column: str, weight: float = 1.0) -> Term:
        options = dict(case.options) if name != "huber" else {}
        kind: type[Field] = Category if name == "cross_entropy" else Number
        field = kind(column, "", "target")
        return Term(name, weight, build(registry.losses[name], options), (output,), (field,))

    if case.terms == "binary":
        return [term("bce_with_logits", "amount", "yes")]
    if case.terms == "pairs":
        loss = build(registry.losses["info_nce"], {})
        return [Term("info_nce", 1.0, loss, ("first", "second"), ())]
    found = [term("cross_entropy", "classes", "label")]
    return found + ([term("huber", "amount", "price", 2.0)] if case.terms == "both" else [])


Found = tuple[Tensor, float]


def flat(model: nn.Module) -> Tensor:
    """All gradients in one float64 vector."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([grad.reshape(-1) for grad in grads]).double()


def reference(case: Case) -> Found:
    """One process, float64, the whole batch at once."""
    model, batch = Model().double(), rows(case, torch.float64)
    loss = mean(case, model(batch), batch)
    loss.backward()  # type: ignore[no-untyped-call]
    return flat(model), float(loss.detach())


def parts(case: Case, rank: int) -> list[tuple[int, dict[str, Tensor]]]:
    """This worker's micro-batches with their numbers."""
    everything, found, start = rows(case), [], 0
    for number, (worker, size) in enumerate(
        (w, size) for w, sizes in enumerate(case.split) for size in sizes
    ):
        if worker == rank:
            part = {name: value[start : start + size] for name, value in everything.items()}
            found.append((number, part))
        start += size
    return found


class Still(torch.optim.SGD):
    """Leaves weights and gradients as they are."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing."""


def ours(case: Case, rank: int, num: int) -> Found:
    """The product's own step."""
    model = Model()
    objective = Objective(model, ["features"], terms(case), {"classes": 4, "amount": None})
    if case.weighted:
        objective.sample_weight = SampleWeight(column="importance")
    own: Any = parts(case, rank)
    batch = step_batch(objective, own, sum(map(len, case.split)))
    gradients = OverlappedGradients(objective, Seeds(0, CPU))
    losses = train_step(objective, Still(model.parameters()), gradients, batch)
    return flat(model), losses.total or 0.0


def plain(case: Case, rank: int, num: int) -> Found:
    """DDP as its documentation shows it."""
    model = Model()
    idle = case.terms != "both"  # one of the two outputs
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=idle)
    own = parts(case, rank)
    reported = torch.zeros(1)
    for place, (_, batch) in enumerate(own):
        loss = mean(case, wrapped(batch), batch) / len(own)
        if place < len(own) - 1:
            with wrapped.no_sync():
                loss.backward()  # type: ignore[no-untyped-call]
        else:
            loss.backward()  # type: ignore[no-untyped-call]
        reported += loss.detach()
    dist.all_reduce(reported)
    return flat(model), float(reported) / num


def both(rank: int, num: int) -> list[tuple[Found, Found]]:
    """Each case done in both ways."""
    return [(ours(case, rank, num), plain(case, rank, num)) for case in CASES]


def error(found: Found, wanted: Found) -> tuple[float, float]:
    """Relative errors of gradient and loss."""
    gradient = float((found[0] - wanted[0]).norm() / wanted[0].norm())
    return gradient, abs(found[1] - wanted[1]) / abs(wanted[1])


def results(rounds: int, quick: bool) -> Iterator[Result]:
    """Relative errors of each case, in both ways."""
    for case, (mine, theirs) in zip(CASES, on_workers(2, both)[0], strict=True):
        wanted = reference(case)
        gradient, loss = error(mine, wanted)
        ddp_gradient, ddp_loss = error(theirs, wanted)
        yield {
            "case": case.name, "gradient": gradient, "loss": loss,
            "ddp_gradient": ddp_gradient, "ddp_loss": ddp_loss,
        }  # fmt: skip
