"""`pipeline prove`: honest jobs hold, and each planted fault is found and named."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import pytest

from tests.clusters import until
from tests.conftest import JOBS, Command, Write

FAULTY = '''
"""Components that break the promise, each in its own way."""

import torch
from torch import nn

import pipeline
from pipeline.losses.contract import Loss
from pipeline.models.parts import Features, Outputs


class Net(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.features = Features(inputs)
        self.hidden = nn.Linear(self.features.width, 16)
        self.middle = self.between()
        self.outputs = Outputs(16, outputs)

    def forward(self, batch):
        return self.outputs(self.middle(self.hidden(self.features(batch)).relu()))


@pipeline.models.register("t_normed")
class Normed(Net):
    def between(self):
        return nn.BatchNorm1d(16)


class OwnDropout(nn.Module):
    """Draws from a generator of its own, which no step's seed reaches."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, hidden):
        return hidden * (torch.rand(hidden.shape, generator=self.generator) > 0.3)


@pipeline.models.register("t_unseeded")
class Unseeded(Net):
    def between(self):
        return OwnDropout()


@pipeline.models.register("t_honest")
class Honest(Net):
    def between(self):
        return nn.Dropout(0.3)


class Unordered(nn.Module):
    """Sums in the order of a set, which is another one in each process."""

    def forward(self, hidden):
        parts = dict(zip("abcdefghijklmnop", hidden.unbind(1)))
        return hidden + sum(parts[name] * 0.1 for name in set(parts))[:, None]


@pipeline.models.register("t_unordered")
class UnorderedNet(Net):
    def between(self):
        return Unordered()


class Counted(nn.Module):
    calls = 0

    def forward(self, hidden):
        self.calls += 1
        return hidden * (1.0 if self.calls < 40 else 0.5)


@pipeline.models.register("t_counted")
class CountedNet(Net):
    def between(self):
        return Counted()


class Dropping(nn.Module):
    def forward(self, hidden):
        return nn.functional.dropout(hidden, 0.3)


@pipeline.models.register("t_dropping")
class DroppingNet(Net):
    def between(self):
        return Dropping()


class Coupled(nn.Module):
    def forward(self, hidden):
        return hidden * (1 + 2e-4 * hidden.mean())


@pipeline.models.register("t_coupled")
class CoupledNet(Net):
    def between(self):
        return Coupled()


class Hooked(nn.Linear):
    def __init__(self):
        super().__init__(16, 16)
        self.weight.register_hook(lambda gradient: gradient / gradient.norm())


@pipeline.models.register("t_hooked")
class HookedNet(Net):
    def between(self):
        return Hooked()


@pipeline.optimizers.register("t_forgetful")
class Forgetful(torch.optim.SGD):
    def __init__(self, params, *, lr: float = 0.01):
        super().__init__(params, lr=lr)
        self.momenta = {}

    @torch.no_grad()
    def step(self, closure=None):
        for place, weight in enumerate(self.param_groups[0]["params"]):
            before = self.momenta.get(place, torch.zeros_like(weight))
            self.momenta[place] = 0.9 * before + weight.grad
            weight -= self.param_groups[0]["lr"] * self.momenta[place]


@pipeline.losses.register("t_lying")
def t_lying():
    """Its denominator says half a row where there are many: no trial of a few rows sees it."""

    def denominator(num_rows, target):
        return torch.full((num_rows,), 0.5 if num_rows > 64 else 1.0, dtype=torch.float64)

    return Loss(lambda p, t: (p - t) ** 2, denominator)
'''


NARROW = '''
"""A model that only takes float32."""

from torch import nn

import pipeline
from pipeline.models.parts import Features


@pipeline.models.register("t_narrow")
class Narrow(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.features = Features(inputs)
        self.last = nn.Linear(self.features.width, 1)

    def forward(self, batch):
        narrow = {name: column.float() for name, column in batch.items()}
        return self.last(self.features(narrow)).squeeze(1)
'''


@pytest.mark.parametrize(
    ("told", "workers"),
    [(signal.SIGINT, "1"), pytest.param(signal.SIGTERM, "1,2", marks=pytest.mark.chaos)],
)
def test_a_signal_ends_it_without_a_verdict(
    job: Write, told: signal.Signals, workers: str, tmp_path: Path
) -> None:
    path = job({"training.epochs": 100_000})
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "prove", str(path), "--workers", workers,
         "--steps", "200000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    until(lambda: bool(list(tmp_path.glob("runs/prove-*/*/curve.jsonl"))), process)
    process.send_signal(told)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + told, err
    assert "no verdict" in err
    assert not {"held", "broken", "failed"} & set(out.split())


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    path = tmp_path / "faulty.py"
    path.write_text(FAULTY)
    return path


def test_a_batch_norm_is_named(job: Write, command: Command, faulty: Path) -> None:
    path = job({"model": "t_normed", "data.validation": None})
    code, out, _ = command("prove", path, "--import", faulty, "--workers", "1", "--json")
    found = json.loads(out.splitlines()[-1])
    assert code == 1
    assert found["state"] == "broken"
    assert found["suspects"] == [
        "middle (BatchNorm1d): normalises by the statistics of one micro-batch"
    ]
    verdicts = {leg["promise"]: leg["verdict"] for leg in found["outcomes"]}
    assert verdicts["rounding"] == "broken"


@pytest.mark.parametrize(
    ("changes", "component", "cause"),
    [
        ({"model": "t_unordered"}, "middle (Unordered)", "the order of a set"),
        ({"model": "t_counted"}, "middle (Counted)", "after many calls: it keeps `calls`"),
        ({"model": "t_coupled"}, "middle (Coupled)", "when other rows are beside it"),
        ({"model": "t_hooked"}, "middle (Hooked)", "the gradient hook on `weight` acts on each"),
        ({"optimizer": {"name": "t_forgetful"}}, "optimizer t_forgetful", "keeps state (`momenta`"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_component_is_named_with_its_cause(
    changes: dict[str, Any], component: str, cause: str, job: Write, command: Command, faulty: Path
) -> None:
    arguments = ["--import", faulty, "--workers", "1", "--steps", "20", "--json"]
    code, out, _ = command("prove", job(changes), *arguments)
    (found,) = json.loads(out.splitlines()[-1])["suspects"]
    assert code == 1
    assert found.startswith(f"{component}: ")
    assert cause in found


def test_dropout_that_stays_on_in_evaluation_is_called_that_and_drawn_alike(
    job: Write, command: Command, faulty: Path
) -> None:
    path = job({"model": "t_dropping", "training.microbatch_size": 2})
    code, out, err = command("check", path, "--import", faulty)
    assert code == 0
    assert "middle (Dropping) draws random numbers in evaluation too" in out
    assert "depends on the other rows" not in out
    code, out, err = command("prove", path, "--import", faulty, "--workers", "1", "--steps", "5")
    assert code == 0, out + err


def test_a_component_that_breaks_the_promise_is_why_it_is_broken(
    job: Write, command: Command, faulty: Path
) -> None:
    path = job({"model": "t_counted", "training.microbatch_size": 2})
    code, out, _ = command("prove", path, "--import", faulty, "--workers", "1", "--steps", "2")
    assert code == 1
    assert "broken: a component breaks the promise; 3 of 3 other ways to run the first 2" in out


def test_a_denominator_that_lies_is_named(job: Write, command: Command, faulty: Path) -> None:
    from tests.conftest import rows

    changes = {"loss": "t_lying", "training.batch_size": 100, "training.microbatch_size": 50}
    path = job(changes, data=rows(200))
    code, out, _ = command("prove", path, "--import", faulty, "--workers", "1", "--json")
    found = json.loads(out.splitlines()[-1])
    assert code == 1
    assert found["suspects"] == [
        "loss t_lying: the denominator of a row depends on the rows beside it"
    ]
    broken = [leg["title"] for leg in found["outcomes"] if leg["verdict"] == "broken"]
    assert broken == ["float64, 1 worker", "float64, micro-batches of 25"]


@pytest.mark.ray
@pytest.mark.chaos
def test_a_dropout_that_ignores_the_seed_is_named(
    job: Write, command: Command, faulty: Path
) -> None:
    path = job({"model": "t_unseeded"})
    arguments = ["--import", faulty, "--workers", "1,2", "--steps", "2", "--json"]
    code, out, _ = command("prove", path, *arguments)
    found = json.loads(out.splitlines()[-1])
    assert code == 1
    assert found["suspects"] == [
        "middle (OwnDropout): gives different numbers for the same rows and seed: "
        "it keeps `generator` from call to call, outside its parameters and buffers"
    ]
    legs = found["outcomes"]
    assert [leg["verdict"] for leg in legs if leg["promise"] == "bits"] == [
        "reference", "broken",
    ]  # fmt: skip
    assert legs[1]["first_step"] == 1


@pytest.mark.ray
def test_an_ordinary_job_is_proved_with_kills_and_other_numbers_of_workers(
    job: Write, command: Command, faulty: Path, tmp_path: Path
) -> None:
    path = job({"model": "t_honest"})
    code, out, err = command(
        "prove", path, "--import", faulty, "--workers", "1,3", "--track", "--json"
    )
    assert code == 0, out + err
    assert "held: 3 of 3 other ways" in err
    found = json.loads(out.splitlines()[-1])
    assert "one killed at step" in found["outcomes"][2]["title"]
    assert {leg["verdict"] for leg in found["outcomes"]} == {
        "reference", "held", "not promised",
    }  # fmt: skip
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    run = client.get_run(found["run_id"])
    assert run.data.tags["pipeline.proved"] == "yes"
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {
        "proof.json", "proof.txt",
    }  # fmt: skip


def test_a_loss_of_the_whole_batch_holds(command: Command, tmp_path: Path) -> None:
    storage = f"storage={tmp_path}"
    code, out, _ = command(
        "prove", JOBS / "embedding.yaml", "--set", storage, "--workers", "1", "--steps", 12
    )
    assert code == 0, out
    assert "held: 3 of 3 other ways" in out
    assert "note  bits were not compared: that takes more than one worker (--workers 1,2)" in out


def test_more_workers_than_the_machine_can_hold_are_refused(job: Write, command: Command) -> None:
    code, _, err = command("prove", job(), "--workers", "1,50")
    assert code == 2
    assert "cores" in err


def test_a_model_that_cannot_run_in_float64_is_not_called_broken(
    job: Write, command: Command, tmp_path: Path
) -> None:
    own = tmp_path / "narrow.py"
    own.write_text(NARROW)
    code, out, _ = command("prove", job({"model": "t_narrow"}), "--import", own, "--workers", "1")
    assert code == 0, out
    assert "not promised" in out


@pytest.mark.parametrize("precision", ["bfloat16", "float64"])
def test_every_precision_can_be_proved(job: Write, command: Command, precision: str) -> None:
    path = job({"model": "mlp", "training.precision": precision})
    code, out, err = command("prove", path, "--workers", "1", "--steps", "5")
    assert code == 0, out + err


def test_invalid_numbers_of_workers_are_refused(job: Write, command: Command) -> None:
    code, _, err = command("prove", job(), "--workers", "1,two")
    assert code == 2
    assert "expected numbers such as 1,2,3" in err


def test_a_fault_that_is_the_same_on_any_number_of_workers_is_seen(
    job: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients in rooms that are always in C order, while fused optimizers walk memory."""
    from torch import nn

    import pipeline
    from pipeline import registry
    from pipeline.distributed import ordered
    from pipeline.verify.prove import prove

    @pipeline.models.register("t_columns_first")
    def columns_first(inputs: Any, outputs: Any) -> nn.Module:
        model: nn.Module = registry.models["mlp"].build(inputs, outputs, hidden=[5])
        for parameter in model.parameters():
            parameter.data = parameter.data.t().contiguous().t()
        return model

    def found() -> dict[str, str]:
        path = job({"model": "t_columns_first", "optimizer.name": "adam"})
        proof = prove(path, workers=[1], steps=5)
        return {outcome.title: outcome.verdict for outcome in proof.outcomes}

    assert set(found().values()) == {"reference", "held"}
    monkeypatch.setattr(ordered, "_view_as", lambda room, like: room[: like.numel()].view_as(like))
    planted = found()
    assert planted["float64, plain torch"] == "reference"
    assert planted["float64, 1 worker"] == "broken"
