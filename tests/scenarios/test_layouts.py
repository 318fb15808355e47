"""Models whose parameters torch holds in unusual ways, against a plain torch loop."""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

import pipeline
from pipeline.checks.job import check
from pipeline.data.batch import Batch
from pipeline.distributed import comm
from pipeline.distributed.ordered import OrderedGradients
from pipeline.distributed.seeds import Seeds
from pipeline.errors import RunError, UsageError
from pipeline.probes.buffers import changing_buffers
from pipeline.rundir import RunDir
from pipeline.rundir.journal import Reader
from pipeline.spec import load
from pipeline.train import loop, state
from pipeline.train.build import build_objective, build_optimizer
from pipeline.train.job import Job, prepare
from pipeline.train.weights import load_weights, take_weights
from pipeline.verify import plain
from tests.processes import on_workers

NUM_ROWS, STEPS = 29, 6
MODELS: dict[str, type[nn.Module]] = {}


def model(build: type[nn.Module]) -> type[nn.Module]:
    MODELS[build.__name__] = build
    pipeline.models.register(f"t_{build.__name__}")(build)
    return build


def read(batch: Batch) -> Tensor:
    columns = [batch[name] for name in ("a", "b")]
    return torch.stack([column for column in columns if isinstance(column, Tensor)], 1)


class Small(nn.Module):
    """Two numbers in, one out; `hidden` [N, 4] in between."""

    def __init__(self, inputs: Any, outputs: Any) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 4), nn.Linear(4, 1)
        self.more()

    def more(self) -> None: ...

    def middle(self, hidden: Tensor, batch: Batch) -> Any:
        return hidden

    def forward(self, batch: Batch) -> Any:
        return self.last(self.middle(self.first(read(batch)).tanh(), batch)).squeeze(1)


@model
class ChannelsLast(Small):
    def more(self) -> None:
        self.conv, self.norm = nn.Conv2d(2, 3, (1, 2), bias=False), nn.BatchNorm2d(3)
        self.spread = nn.Linear(3 * 2, 4)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def middle(self, hidden: Tensor, batch: Batch) -> Any:
        image = hidden.view(-1, 1, 2, 2).expand(-1, 2, -1, -1)
        return self.spread(self.norm(self.conv(image)).flatten(1))


@model
class Transposed(Small):
    """One weight, and another that is its transpose in the same memory: both are trained."""

    def more(self) -> None:
        self.one = nn.Parameter(torch.randn(4, 4) / 2)
        self.other = nn.Parameter(self.one.data.t())

    def middle(self, hidden: Tensor, batch: Batch) -> Any:
        return (hidden @ self.one).tanh() @ self.other


@model
class Tied(Small):
    def more(self) -> None:
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.one.weight

    def middle(self, hidden: Tensor, batch: Batch) -> Any:
        return self.other(self.one(hidden).tanh())


@model
class OneStorage(Small):
    """Parameters that are parts of one tensor, one of them with gaps in its memory."""

    def more(self) -> None:
        whole = torch.randn(8, 4) / 2
        self.upper, self.lower = nn.Parameter(whole[:4, ::2]), nn.Parameter(whole[4:])

    def middle(self, hidden: Tensor, batch: Batch) -> Any:
        return (hidden @ self.upper) @ self.lower[:2] + hidden @ self.lower


@model
class Complex(Small):
    turn: Tensor

    def more(self) -> None:
        self.odd = nn.Parameter(torch.randn(3))
        self.wave = nn.Parameter(torch.randn(4, 4, dtype=torch.complex64))
        self.register_buffer("turn", torch.ones(4, dtype=torch.complex64))

    def middle(self, hidden: Tensor, batch: Batch) -> Any:
        made = hidden.to(self.wave.dtype) @ self.wave
        if self.training:
            self.turn += made.detach().mean(0).to(self.turn.dtype)
        turned = made if self.training else made * self.turn
        return turned.abs().to(hidden.dtype) + self.odd.sum()


@model
class SparseGradient(Small):
    def more(self) -> None:
        self.table = nn.Embedding(5, 4, sparse=True)

    def middle(self, hidden: Tensor, batch: Batch) -> Any:
        return hidden + self.table((read(batch)[:, 0].abs() * 2).long().clamp(max=4))


@model
class Buffers(Small):
    """A buffer that repeats one number in memory, and flags that forward passes set."""

    shift: Tensor
    seen: Tensor

    def more(self) -> None:
        self.register_buffer("shift", torch.ones(1).expand(4))
        self.register_buffer("seen", torch.zeros(2, dtype=torch.bool))

    def middle(self, hidden: Tensor, batch: Batch) -> Any:
        self.seen |= True
        return hidden + self.shift


@model
class Unreached(Small):
    """Parameters that no row reaches, or only those of some batches."""

    def more(self) -> None:
        self.idle = nn.Linear(4, 4)
        self.rare = nn.Linear(4, 4)

    def middle(self, hidden: Tensor, batch: Batch) -> Any:
        chosen = read(batch)[:, 0] > 1.3
        if not bool(chosen.any()):
            return hidden
        return torch.where(chosen[:, None], self.rare(hidden), hidden)


@model
class Grows(Small):
    """A cache that gets longer as batches do, as of rotary embeddings, and one not made yet."""

    cache: Tensor
    scale: Tensor | None

    def more(self) -> None:
        self.register_buffer("cache", torch.zeros(0), persistent=False)
        self.register_buffer("scale", None)

    def middle(self, hidden: Tensor, batch: Batch) -> Any:
        if len(self.cache) < len(hidden) + 4:
            self.cache = torch.arange(len(hidden) + 4).to(hidden).cos()
        if self.scale is None:
            self.scale = torch.full((4,), 0.5).to(hidden)
        return hidden * self.cache[:4] + self.scale


@model
class Counts(Small):
    """Buffers that add up over rows, of which outputs make use: they are those of all rows."""

    seen: Tensor
    shares: Tensor
    total: Tensor
    steps: Tensor

    def more(self) -> None:
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("shares", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("total", torch.zeros(2))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def middle(self, hidden: Tensor, batch: Batch) -> Any:
        scaled = hidden * (1 + 0.01 * self.seen + 0.01 * self.shares[1] + 0.01 * self.total[0])
        if self.training:
            rows = read(batch).detach()
            self.seen += len(rows)
            self.shares += torch.bincount((rows[:, 0].abs() * 2).long().clamp(max=2), minlength=3)
            self.total += rows.sum(0).to(self.total)
            self.steps += 1
        return scaled.to(hidden)


@model
class Averages(Small):
    """Buffers that do not add up: an average from zeros, the least value from infinity, flags."""

    average: Tensor
    least: Tensor
    seen: Tensor

    def more(self) -> None:
        self.register_buffer("average", torch.zeros(4))
        self.register_buffer("least", torch.full((4,), torch.inf))
        self.register_buffer("seen", torch.zeros(16))

    def middle(self, hidden: Tensor, batch: Batch) -> Any:
        known = torch.where(self.least.isfinite(), self.least, 0.0)
        made = hidden + 0.1 * (self.average + known + self.seen[:4])
        if self.training and len(hidden):
            self.average.mul_(0.9).add_(hidden.detach().sum(0), alpha=0.1)
            self.least.copy_(torch.minimum(self.least, hidden.detach().amin(0)))
            self.seen[(read(batch)[:, 0].abs() * 4).long().clamp(max=15)] = 1.0
        return made


@model
class Packed(Small):
    """A part that keeps its weight under another name in its state dict."""

    def more(self) -> None:
        self.packed = Packing()

    def middle(self, hidden: Tensor, batch: Batch) -> Any:
        return hidden * self.packed.weight


class Packing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}kept"] = self.weight.detach()

    def _load_from_state_dict(self, state: Any, prefix: str, *others: Any) -> None:
        self.weight.data.copy_(state.pop(f"{prefix}kept"))


@model
class Resets(Small):
    """A cache that is given up after use, and one of the last rows."""

    cache: Tensor | None
    newest: Tensor

    def more(self) -> None:
        self.register_buffer("cache", torch.zeros(4), persistent=False)
        self.register_buffer("newest", torch.zeros(0, 4), persistent=False)

    def middle(self, hidden: Tensor, batch: Batch) -> Any:
        self.cache, self.newest = None, hidden.detach()
        return hidden


@model
class SparseBuffers(Small):
    """Fixed sparse matrices, as of graphs, in two layouts."""

    rows: Tensor
    grid: Tensor

    def more(self) -> None:
        torch.manual_seed(5)
        mixed = torch.randn(4, 4) * (torch.rand(4, 4) > 0.5)
        self.register_buffer("grid", mixed.to_sparse())
        self.register_buffer("rows", mixed.t().to_sparse_csr())

    def middle(self, hidden: Tensor, batch: Batch) -> Any:
        return hidden + (self.grid @ hidden.t()).t() + (self.rows @ hidden.t()).t()


@model
class Conjugate(Small):
    """Buffers that torch keeps as a note on another tensor: conjugated, negated."""

    wave: Tensor
    minus: Tensor

    def more(self) -> None:
        made = torch.randn(4, dtype=torch.complex64)
        self.register_buffer("wave", made.conj())
        self.register_buffer("minus", made.conj().imag)

    def middle(self, hidden: Tensor, batch: Batch) -> Any:
        return (hidden * self.wave).abs().to(hidden) + self.minus.to(hidden)


@torch.jit.script
def scripted(hidden: Tensor) -> Tensor:
    return hidden.tanh() + hidden


@model
class Experts(Small):
    """Rows reach one expert each, which drops out; the answer is a mapping of its own type."""

    def more(self) -> None:
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def middle(self, hidden: Tensor, batch: Batch) -> Any:
        chosen = (read(batch)[:, 0].abs() * 2).long().clamp(max=2)
        made = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            mine = chosen == number
            if bool(mine.any()):
                made = made.index_put((mine.nonzero()[:, 0],), expert(hidden[mine]))
        return scripted(made)

    def forward(self, batch: Batch) -> Any:
        return OrderedDict(prediction=super().forward(batch))


@model
class Bag(Small):
    """Flat ids with offsets: what a module is given has another number of rows."""

    def more(self) -> None:
        self.table = nn.EmbeddingBag(7, 4, mode="sum")

    def middle(self, hidden: Tensor, batch: Batch) -> Any:
        ids = (read(batch).abs() * 3).long().clamp(max=6)
        return hidden + self.table(ids.flatten(), torch.arange(len(ids)) * 2)


@model
class Rewritten(Small):
    def more(self) -> None:
        self.table = nn.Embedding(5, 4, max_norm=0.5)

    def middle(self, hidden: Tensor, batch: Batch) -> Any:
        return hidden + self.table((read(batch)[:, 0].abs() * 2).long().clamp(max=4))


@model
class SparseCounts(Small):
    counts: Tensor

    def more(self) -> None:
        self.register_buffer("counts", torch.eye(4).to_sparse())

    def middle(self, hidden: Tensor, batch: Batch) -> Any:
        self.counts = self.counts + torch.eye(4).to(hidden).to_sparse() * len(hidden)
        return hidden


@model
class Expanded(Small):
    def more(self) -> None:
        self.repeated = nn.Parameter(torch.ones(1).expand(4))

    def middle(self, hidden: Tensor, batch: Batch) -> Any:
        return hidden * self.repeated


@pipeline.optimizers.register("t_noisy")
class Noisy(torch.optim.SGD):
    """Langevin: each update draws."""

    def __init__(self, parameters: Any, *, lr: float = 0.05) -> None:
        super().__init__(parameters, lr=lr)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter += 1e-2 * torch.randn_like(parameter)


@pipeline.optimizers.register("t_previous")
class Previous(torch.optim.SGD):
    """Keeps the gradients of the step before, as they are."""

    def __init__(self, parameters: Any, *, lr: float = 0.05) -> None:
        super().__init__(parameters, lr=lr)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is None:
                continue
            before = self.state[parameter].get("previous", torch.zeros_like(parameter))
            parameter -= 0.05 * (parameter.grad - 0.5 * before)
            self.state[parameter]["previous"] = parameter.grad


@pipeline.optimizers.register("t_swaps")
class Swaps(Noisy):
    """The same numbers in another order on each worker."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        torch.optim.SGD.step(self)
        if comm.rank():
            self.param_groups[0]["params"][0].copy_(self.param_groups[0]["params"][0].flip(0))


@pipeline.optimizers.register("t_numpys")
class Numpys(Noisy):
    """The same with random numbers that nobody seeds."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        torch.optim.SGD.step(self)
        self.param_groups[0]["params"][0] += np.random.default_rng().normal()


def job(folder: Path, name: str, optimizer: Any, size: int | None, precision: str) -> Job:
    rng = np.random.default_rng(3)
    columns = {key: rng.normal(size=NUM_ROWS) for key in ("a", "b", "y")}
    pq.write_table(pa.table(columns), folder / "rows.parquet")
    return prepare(
        load(
            {
                "name": "t", "loss": "mse", "model": f"t_{name}", "optimizer": optimizer,
                "data": {"train": str(folder / "rows.parquet"), "target": "y"},
                "training": {"epochs": 3, "batch_size": 13, "microbatch_size": size,
                             "precision": precision, "clip_norm": 2.0},
                "checkpoint": {"every_steps": 2},
            }
        ),
        folder,
    )  # fmt: skip


ADAMW = {"name": "adamw", "lr": 0.05, "weight_decay": 0.5}
SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
HELD = [name for name in MODELS if name not in ("Expanded", "Rewritten", "SparseCounts")]
CASES = [
    *product(HELD, (ADAMW,), (None, 3), ("float64",)),
    *product(HELD, (ADAMW,), (3,), ("float32",)),
    *product(HELD, (SGD,), (None, 3), ("float64",)),
    *product(("Tied",), ({"name": "t_noisy"}, {"name": "t_previous"}), (None, 3), ("float64",)),
]  # fmt: skip


def title(case: Any) -> str:
    name, optimizer, size, precision = case
    return f"{name}, {optimizer['name']}, {size}, {precision}"


Trained = tuple[list[float], dict[str, Tensor]]


def trained(case: Any, overlapped: bool) -> Trained | str:
    """Losses and weights of the workers' own code; by DDP, if that can be."""
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        if overlapped:
            patch.setattr(state, "is_small", lambda objective: False)
        folder = Path(place)
        try:
            loop.train(job(folder, *case), RunDir(folder), num_steps=STEPS)
        except UsageError as error:
            return str(error)
        if comm.rank():
            return "of the first worker"
        points = list(Reader(folder / "curve.jsonl").new())
        losses = [point["train"]["loss"] or 0.0 for point in points if "train" in point]
        return losses, load_weights(folder / "weights.pt")


def all_trained(rank: int, num: int) -> dict[str, Trained | str]:
    return {title(c) + str(o): trained(c, o) for c in CASES for o in (False, True)}


@cache
def on(num: int) -> dict[str, Trained | str]:
    found: dict[str, Trained | str] = on_workers(num, all_trained)[0]
    return found


@pytest.mark.parametrize("num", [1, 3])
@pytest.mark.parametrize("overlapped", [False, True], ids=["own order", "ddp"])
@pytest.mark.parametrize("case", CASES, ids=title)
def test_it_trains_as_in_a_plain_torch_loop(
    case: Any, overlapped: bool, num: int, tmp_path: Path
) -> None:
    name, _, size, precision = case
    if name in ("Averages", "ChannelsLast", "Complex") and size is None and num > 1:
        return  # running statistics are the mean over the workers' shares of a whole batch
    got = on(num)[title(case) + str(overlapped)]
    assert not isinstance(got, str), got
    points, bound = plain.steps(job(tmp_path, *case), STEPS)
    rtol = 1e-9 if precision == "float64" else 1e-3
    losses = [point["train"]["loss"] for point in points]
    assert got[0] == pytest.approx(losses, rel=rtol)
    for key, value in bound.state_dict().items():
        torch.testing.assert_close(got[1][key], value, rtol=rtol, atol=rtol, check_layout=False)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Counts", {"seen": True, "shares": True, "total": True, "steps": False}),
        ("Averages", {"average": False, "least": False, "seen": False}),
        ("Grows", {}),
        ("ChannelsLast", {}),
    ],
)
def test_whether_buffers_add_up_is_tried_beyond_the_first_step(
    name: str, expected: dict[str, bool], precision: str, tmp_path: Path
) -> None:
    made = job(tmp_path, name, SGD, 3, precision)
    bound = build_objective(made.spec, made.fields)
    bound.model.first = nn.Sequential(bound.model.first, nn.Dropout(0.1))  # type: ignore[arg-type]
    found = changing_buffers(bound, made.trial)
    assert found == {f"model.{key}": value for key, value in expected.items()}


@pytest.mark.parametrize("name", HELD)
def test_a_new_process_takes_every_weight_and_buffer(name: str, tmp_path: Path) -> None:
    made = job(tmp_path, name, SGD, 3, "float32")
    _, bound = plain.steps(made, 2)
    optimizer = build_optimizer(made.spec, bound.named_parameters())
    gradients = OrderedGradients(bound, Seeds(0, torch.device("cpu")))
    saved = state.TrainState(bound, optimizer, gradients).snapshot()
    batch = made.trial
    expected = bound.eval().predict(batch)["prediction"]
    resumed, served = (build_objective(made.spec, made.fields) for _ in range(2))
    optimizer = build_optimizer(made.spec, resumed.named_parameters())
    gradients = OrderedGradients(resumed, Seeds(0, torch.device("cpu")))
    state.TrainState(resumed, optimizer, gradients).restore(saved, 2)
    take_weights(served, saved["weights"])
    for other in (resumed, served):
        torch.testing.assert_close(
            other.eval().predict(batch)["prediction"], expected, rtol=0, atol=0
        )
    for key, buffer in bound.named_buffers():
        assert dict(resumed.named_buffers())[key].shape == buffer.shape


def drifting(rank: int, num: int) -> list[str]:
    found = []
    for name in ("t_numpys", "t_swaps"):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            made = job(folder, "Tied", {"name": name}, 3, "float32")
            try:
                loop.train(made, RunDir(folder))
            except RunError as error:
                found.append(str(error))
    return found


def test_workers_that_drift_apart_end_the_run_with_the_name_of_what_differs() -> None:
    for messages in on_workers(3, drifting):
        assert len(messages) == 2
        for message in messages:
            assert "after step 2 the workers no longer hold the same model.first.weight" in message


def test_weights_that_a_forward_pass_writes_are_refused_for_several_workers(tmp_path: Path) -> None:
    made = job(tmp_path, "Rewritten", SGD, 3, "float32")
    (notice,) = [notice for notice in check(made) if "writes its parameter" in notice.text]
    assert "'table.weight' in the forward pass, as an Embedding with max_norm" in notice.text
    several = replace(made, spec=load({**made.spec.model_dump(mode="json"), "workers": {"num": 2}}))
    with pytest.raises(UsageError, match=r"model t_Rewritten: writes its parameter 'table.weight'"):
        check(several)


def test_a_sparse_buffer_that_forward_passes_change_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"buffer model.counts is sparse.* register it dense"):
        check(job(tmp_path, "SparseCounts", SGD, 3, "float32"))


def test_below_float32_no_kernel_is_fused() -> None:
    """That of SGD keeps a wrong momentum on CPUs."""
    for dtype in (torch.bfloat16, torch.float16):
        torch.manual_seed(0)
        start = torch.randn(40).to(dtype)
        made = []
        for build in (pipeline.registry.optimizers["sgd"].build, torch.optim.SGD):
            weight = nn.Parameter(start.clone())
            optimizer = build([weight], lr=0.1, momentum=0.9)
            for step in range(4):
                weight.grad = torch.full_like(weight, step + 1)
                optimizer.step()
            made.append(weight.detach())
        assert torch.equal(*made)


def test_an_optimizer_that_draws_keeps_the_workers_together() -> None:
    """Its numbers follow from seed and step: the weights are those of one worker, to the bit."""
    case = ("Tied", {"name": "t_noisy"}, 3, "float64")
    alone, three = on(1)[title(case) + "False"], on(3)[title(case) + "False"]
    assert not isinstance(alone, str)
    assert not isinstance(three, str)
    assert alone[0] == three[0]
    assert all(torch.equal(value, three[1][key]) for key, value in alone[1].items())


@pytest.mark.parametrize("decay", [ADAMW, SGD], ids=lambda options: str(options["name"]))
def test_neither_decay_nor_momentum_moves_what_no_row_reaches(decay: Any, tmp_path: Path) -> None:
    got = on(3)[title(("Unreached", decay, 3, "float64")) + "False"]
    assert not isinstance(got, str)
    torch.manual_seed(0)
    first = Unreached(None, None)
    torch.testing.assert_close(
        got[1]["model.idle.weight"], first.idle.weight.double(), rtol=0, atol=0
    )
    assert not torch.equal(got[1]["model.rare.weight"], first.rare.weight.double())


def test_a_parameter_that_repeats_a_number_in_memory_is_refused(tmp_path: Path) -> None:
    made = job(tmp_path, "Expanded", SGD, None, "float32")
    with pytest.raises(
        UsageError, match=r"parameter 'model.repeated' repeats .* append .clone\(\)"
    ):
        loop.train(made, RunDir(tmp_path))
