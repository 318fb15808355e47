"""What `check` finds of users' custom components before training, each with its fix."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import pipeline
from pipeline import registry
from pipeline.models.parts import Features, Outputs
from tests.conftest import Command, Write


class Net(nn.Module):
    def __init__(self, inputs: Any, outputs: Any, *, width: int = 4) -> None:
        super().__init__()
        self.features = Features(inputs)
        self.first = nn.Linear(self.features.width, width)
        self.second = self.between(width)
        self.outputs = Outputs(width, outputs)

    def between(self, width: int) -> nn.Module:
        return nn.Linear(width, width)

    def forward(self, batch: Any) -> Any:
        return self.outputs(self.second(self.first(self.features(batch))))


@pipeline.models.register("t_lazy")
class Lazy(Net):
    def between(self, width: int) -> nn.Module:
        return nn.LazyLinear(width)


@pipeline.models.register("t_batch_norm")
class BatchNorm(Net):
    def between(self, width: int) -> nn.Module:
        return nn.BatchNorm1d(width)


@pipeline.models.register("t_reentrant")
class Reentrant(Net):
    def forward(self, batch: Any) -> Any:
        hidden = self.first(self.features(batch))
        return self.outputs(checkpoint(self.second, hidden, use_reentrant=True))


pipeline.optimizers.register("t_lbfgs")(torch.optim.LBFGS)


@pipeline.optimizers.register("t_broken_optimizer")
class Broken(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        raise RuntimeError("not today")


@pipeline.losses.register("t_anything")
def t_anything(*arguments: torch.Tensor) -> torch.Tensor:
    return (arguments[0] - arguments[1]).abs()


@pipeline.losses.register("t_complex")
def t_complex(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return torch.complex(prediction - target, target)


@pipeline.losses.register("t_noisy")
def t_noisy(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (prediction - target + torch.rand_like(target)) ** 2


def t_odd_annotation(
    prediction: torch.Tensor,
    target: torch.Tensor,
    *,
    level: "Nowhere" = 1,  # type: ignore[name-defined]  # noqa: F821, UP037
) -> torch.Tensor:
    return level * (prediction - target)  # type: ignore[no-any-return]


@pipeline.schedules.register("t_nan")
def t_nan(progress: float, step: int) -> float:
    """Not a number from halfway on."""
    return math.nan if progress >= 0.5 else 1.0


@pipeline.schedules.register("t_text")
def t_text(progress: float, step: int) -> float:
    """A word instead of a factor."""
    return "much"  # type: ignore[return-value]


FAULTS = {
    "complex loss": ({"loss": "t_complex"}, "gives complex numbers", "return real ones"),
    "noisy loss": ({"loss": "t_noisy"}, "gives other numbers for the same predictions",
                   "draw random numbers in the model"),
    "schedule of NaN": ({"schedule": "t_nan"}, "schedule t_nan: at step", "it gives nan"),
    "schedule of text": ({"schedule": "t_text"}, "schedule t_text: at step 1 of",
                         "it fails: ValueError: could not convert"),
    "lazy": ({"model": "t_lazy"}, "second is a LazyLinear", "take Linear with its size"),
    "batch norm": ({"model": "t_batch_norm", "training.microbatch_size": 3,
                    "data.validation": None, "training.batch_size": 25},
                   "fails on 1 row", "to GroupNorm or LayerNorm"),
    "reentrant": ({"model": {"name": "t_reentrant", "width": 520}, "workers.num": 2},
                  "use_reentrant=True", "pass use_reentrant=False"),
    "lbfgs": ({"optimizer": {"name": "t_lbfgs"}}, "asks for a closure", "take another optimizer"),
    "optimizer": ({"optimizer": {"name": "t_broken_optimizer"}},
                  "fails in its first step: RuntimeError: not today", f"{Path(__file__).name}:"),
}  # fmt: skip


@pytest.mark.parametrize("what", FAULTS)
def test_it_is_found_before_training(what: str, job: Write, command: Command) -> None:
    changes, problem, fix = FAULTS[what]
    data = None
    if what == "batch norm":
        data = "a,b,y\n" + "".join(f"{i},{i % 5},{i % 7}\n" for i in range(25))
    code, _, err = command("check", job(changes, data=data))
    assert code == 2, err
    assert problem in err
    assert fix in err


def test_a_loss_may_take_its_arguments_as_a_tuple(job: Write, command: Command) -> None:
    code, _, err = command("check", job({"loss": "t_anything"}))
    assert code == 0, err


def test_an_annotation_that_names_nothing_is_a_fault_of_its_option(
    job: Write, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = registry.Entry("t_odd_annotation", "loss", t_odd_annotation)
    monkeypatch.setitem(registry.losses.entries, "t_odd_annotation", entry)
    code, _, err = command("check", job({"loss": "t_odd_annotation"}))
    assert code == 2, err
    assert "option level of t_odd_annotation" in err
    assert "'Nowhere'" in err


def test_reentrant_checkpoints_are_taken_where_their_gradients_can_be_summed(
    job: Write, command: Command
) -> None:
    model = {"name": "t_reentrant", "width": 520}
    code, _, err = command("check", job({"model": model, "training.microbatch_size": 4}))
    assert code == 0, err


def test_weights_by_label_without_a_target_name_the_missing_target(
    job: Write, command: Command
) -> None:
    loss = {"name": "cross_entropy", "class_weight": {"red": 1.0}}
    code, _, err = command("check", job({"loss": loss, "data.target": None}))
    assert code == 2
    assert "needs a target" in err
    assert "name one in data.target" in err


@pytest.mark.parametrize("yes", [1, True, "yes"])
def test_balanced_weights_are_taken_for_any_two_values(
    yes: Any, job: Write, command: Command, tmp_path: Path
) -> None:
    from pipeline.spec import load
    from pipeline.train.job import prepare

    no = "no" if yes == "yes" else type(yes)(0)
    labels = [yes if i % 4 == 0 else no for i in range(24)]
    pd.DataFrame({"a": range(24), "b": range(24), "y": labels}).to_csv(
        tmp_path / "yes.csv", index=False
    )
    loss = {"name": "bce_with_logits", "pos_weight": "balanced"}
    path = job({"loss": loss, "data.train": "yes.csv", "data.validation": None})
    code, _, err = command("check", path)
    assert code == 0, err
    made = prepare(load(path), tmp_path)
    bound = made.objective()
    one = torch.tensor([0.0]), torch.tensor([1.0])
    assert float(bound.terms[0].loss.items(*one)) == pytest.approx(3 * 0.6931472)


@pipeline.losses.register("t_focal", like="cross_entropy")
def t_focal(prediction: torch.Tensor, target: torch.Tensor, *, gamma: float = 2.0) -> Any:
    each: torch.Tensor = nn.functional.cross_entropy(prediction, target, reduction="none")
    hard: torch.Tensor = (1 - (-each).exp()) ** gamma
    return hard * each


@pipeline.losses.register("t_focal_class", like="cross_entropy")
class FocalClass(nn.Module):
    def __init__(self, reduction: str = "none") -> None:
        super().__init__()

    def forward(self, prediction: torch.Tensor, target: torch.Tensor) -> Any:
        return t_focal(prediction, target)


@pytest.mark.parametrize("loss", ["t_focal", "t_focal_class"])
def test_a_custom_loss_like_another_has_metrics_labels_and_probabilities(
    loss: str, job: Write, tmp_path: Path
) -> None:
    changes = {"loss": loss, "data.target": "color", "data.inputs": ["a", "b"]}
    result = pipeline.run(job(changes))
    assert {"loss", "accuracy", "log_loss", "roc_auc"} <= set(result.metrics)
    served = result.model.predict(pd.DataFrame({"a": [1.0, 2.0], "b": [3, 4]}))
    assert list(served) == ["color", *(f"color_probability_{c}" for c in ("blue", "green", "red"))]
    assert set(served["color"]) <= {"red", "green", "blue"}
