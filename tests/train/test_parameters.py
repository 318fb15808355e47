"""Parameters by pattern: what is frozen, grouped, adapted and taken from trained weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pipeline.errors import UsageError
from pipeline.spec.components import Group, InitFrom, Lora, Optimizer
from pipeline.spec.components import Model as ModelChoice
from pipeline.train.parameters import choose_trained, find, groups, initialise


def network() -> nn.ModuleDict:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4))
    return nn.ModuleDict({"encoder": encoder, "norm": nn.BatchNorm1d(4), "head": nn.Linear(4, 2)})


def frozen(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if not p.requires_grad}


def choice(**keys: Any) -> ModelChoice:
    return ModelChoice.model_validate({"name": "linear", **keys})


NAMES = ["encoder.0.weight", "encoder.0.bias", "encoder_2.weight", "head.bias"]


@pytest.mark.parametrize(
    ("patterns", "found"),
    [
        (("encoder",), NAMES[:2]),  # a module, and not one whose name begins as its does
        (("encoder*",), NAMES[:3]),
        (("*.bias",), ["encoder.0.bias", "head.bias"]),
        (("head", "encoder.0.weight"), ["encoder.0.weight", "head.bias"]),
        (("*",), NAMES),
        ((), []),
    ],
)
def test_patterns_name_parameters_and_modules(patterns: tuple[str, ...], found: list[str]) -> None:
    assert find(NAMES, patterns, "key") == found


def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match=r"model\.freeze: 'encodr' .*did you mean 'encoder'"):
        find(NAMES, ("encodr",), "model.freeze")


def test_frozen_layers_keep_their_running_statistics_and_drop_as_before() -> None:
    model = network()
    choose_trained(model, choice(freeze=["encoder"]))
    assert {name.partition(".")[0] for name in frozen(model)} == {"encoder"}
    training = {path for path, module in model.named_modules() if module.training}
    assert "encoder.1" not in training
    assert {"encoder.2", "norm"} <= training


def test_a_norm_of_which_only_the_bias_is_frozen_goes_on() -> None:
    model = network()
    choose_trained(model, choice(freeze="*.bias"))
    assert frozen(model) == {f"{of}.bias" for of in ("encoder.0", "encoder.1", "encoder.3", "norm",
                                                     "head")}  # fmt: skip
    assert all(module.training for module in model.modules())


def test_adapters_are_trained_in_a_model_that_is_frozen() -> None:
    model = network()
    choose_trained(model, choice(freeze="*", lora={"match": "encoder.*", "rank": 2}))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"encoder.{index}.parametrizations.weight.0.lora_{factor}"
        for index in (0, 3) for factor in "ab"
    }  # fmt: skip


def test_only_linear_layers_are_adapted() -> None:
    with pytest.raises(UsageError, match=r"model\.lora\.match: 'norm' matches nothing.*encoder\.0"):
        choose_trained(network(), choice(lora={"match": "norm"}))
    assert Lora(match=("a",)).rank == 8


def shapes(optimizer: Optimizer, model: nn.Module) -> list[tuple[int, dict[str, Any]]]:
    made = groups(((f"model.{name}", p) for name, p in model.named_parameters()), optimizer)
    assert all(isinstance(one, dict) for one in made)
    return [
        (len(one["params"]), {k: v for k, v in one.items() if k != "params"})
        for one in made if isinstance(one, dict)
    ]  # fmt: skip


def test_a_parameter_is_in_the_first_group_that_names_it() -> None:
    optimizer = Optimizer.model_validate({
        "name": "adamw",
        "groups": [{"match": "biases_and_norms", "weight_decay": 0},
                   {"match": ["encoder"], "lr": "1e-5"}],
    })  # fmt: skip
    assert shapes(optimizer, network()) == [
        (1, {}),  # the head's weight
        (7, {"weight_decay": 0.0}),
        (2, {"lr": 1e-5}),
    ]
    assert Group.model_validate({"match": "a", "lr": 1}).model_dump() == {"match": ("a",), "lr": 1}


def test_frozen_parameters_are_in_no_group_and_an_empty_group_is_refused() -> None:
    model = network()
    choose_trained(model, choice(freeze="encoder"))
    options = {"name": "adamw", "groups": [{"match": "encoder", "lr": 1e-5}]}
    with pytest.raises(UsageError, match=r"optimizer\.groups\.0\.match: 'encoder' matches nothing"):
        shapes(Optimizer.model_validate(options), model)
    options["groups"] = [{"match": "head"}, {"match": "head.bias", "lr": 1}]
    with pytest.raises(UsageError, match=r"groups\.1\.match: all parameters .* groups before"):
        shapes(Optimizer.model_validate(options), model)


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(tensor, 2) for name, tensor in model.state_dict().items()}


def test_all_of_the_weights_are_taken_or_those_that_a_pattern_names() -> None:
    model = network()
    initialise(model, weights_of(model), InitFrom(weights="w"))
    assert all((tensor == 2).all() for tensor in model.state_dict().values())
    model = network()
    initialise(model, {**weights_of(model), "other": torch.ones(1)},
               InitFrom(weights="w", match=("encoder",)))  # fmt: skip
    taken = {name for name, tensor in model.state_dict().items() if (tensor == 2).all()}
    assert taken == {name for name in model.state_dict() if name.startswith("encoder.")}


@pytest.mark.parametrize(
    ("change", "match", "message"),
    [
        ({"head.bias": None}, None, r"w lacks head\.bias; `match`"),
        ({"extra": torch.ones(1)}, None, r"has more than the model: extra"),
        ({"head.weight": torch.ones(3, 4)}, None,
         r"other shapes: head\.weight is \[3, 4\], \[2, 4\] in the model"),
        ({"head.bias": None}, ("head",), r"lacks head\.bias"),
        ({"head.bias": torch.ones(7)}, ("head",), r"head\.bias is \[7\], \[2\]"),
        ({"head.bias": torch.ones(2, dtype=torch.int64)}, None, r"kinds of numbers in head\.bias"),
        ({}, ("haed",), r"model\.init_from\.match: 'haed' matches nothing; did you mean 'head'"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused_by_name(
    change: dict[str, Any], match: tuple[str, ...] | None, message: str
) -> None:
    model = network()
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = {**weights_of(model), **change}
    weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
    with pytest.raises(UsageError, match=message):
        initialise(model, weights, InitFrom(weights="w", match=match))
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())


class Tied(nn.Module):
    """A head that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


def test_tied_weights_may_be_given_once_and_are_frozen_by_either_name() -> None:
    for given in ("embedding.weight", "head.weight"):
        model = Tied()
        initialise(model, {given: torch.full((5, 3), 2.0)}, InitFrom(weights="w"))
        assert (model.head.weight == 2).all()
        assert model.head.weight is model.embedding.weight
        choose_trained(model, choice(freeze=[given]))
        assert not model.head.weight.requires_grad


def test_an_adapter_of_a_tied_weight_is_refused() -> None:
    with pytest.raises(UsageError, match="the weight of head is tied to another layer's"):
        choose_trained(Tied(), choice(lora={"match": "head"}))


def test_an_adapter_of_a_computed_weight_is_refused() -> None:
    model = nn.ModuleDict({"head": nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))})
    with pytest.raises(UsageError, match="head computes its weight itself"):
        choose_trained(model, choice(lora={"match": "head"}))


def test_a_norm_that_the_model_froze_itself_goes_on() -> None:
    model = network()
    model["norm"].requires_grad_(False)
    choose_trained(model, choice(freeze="encoder"))
    assert model["norm"].training


def test_a_models_parameter_and_a_losss_of_one_name_are_both_trained() -> None:
    named = [("model.heads.0.weight", nn.Parameter(torch.ones(2))),
             ("heads.0.weight", nn.Parameter(torch.ones(3)))]  # fmt: skip
    assert len(groups(named, Optimizer(name="adamw"))) == 2
    optimizer = Optimizer.model_validate(
        {"name": "adamw", "groups": [{"match": "heads.0", "lr": 0.1}]}
    )
    ((one,),) = (groups(named, optimizer),)
    assert isinstance(one, dict)
    assert [len(p) for p in one["params"]] == [2, 3]


@pytest.mark.parametrize("section", [Lora, Group])
def test_no_pattern_is_no_choice(section: type[Lora] | type[Group]) -> None:
    with pytest.raises(ValueError, match="at least 1 item"):
        section.model_validate({"match": []})
