"""Modules whose numbers are not a function of rows, weights and seed, or that draw random ones."""

from __future__ import annotations

import random
from collections.abc import Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data.batch import Batch
from pipeline.losses.objective import Objective
from pipeline.probes.calls import (
    Call,
    Found,
    equal,
    first_to_differ,
    gradients_of,
    mode,
    passed,
)

UNSTEADY = "gives different numbers for the same rows and seed"
MANY = 4
"""Calls from which on a fault is called late."""


def draws(objective: Objective, batch: Batch, training: bool = True) -> str | None:
    """The module that draws random numbers, as dropout does; the innermost first."""
    with mode(objective, training):
        one, other, again = (passed(objective, batch, seed) for seed in (1, 2, 1))
    odd = first_to_differ(one, other)
    return odd.title if odd and first_to_differ(one, again) is None else None


def unsteady(objective: Objective, batch: Batch, times: int) -> Found:
    """What differs, within so many calls, for the same rows, weights, buffers and seed."""
    with mode(objective, training=True):
        names = dict(objective.model.named_modules())
        before = {name: attributes_of(module) for name, module in names.items()}
        if changed := rewritten(objective, batch):
            fault = f"writes its parameter `{changed}` in the forward pass, which no worker shares"
            return [("model", f"{fault}: keep it in a buffer")]
        first = passed(objective, batch, 1)
        gradients = gradients_of(objective, batch)
        for attempt in range(2, times + 1):
            odd = first_to_differ(passed(objective, batch, 1), first)
            again = gradients_of(objective, batch)
            other = [name for name, g in again.items() if not equal([g], [gradients.get(name, g)])]
            if other and odd is None:  # a counter in a module may have been reached in between
                odd = first_to_differ(passed(objective, batch, 1), first)
            if odd is not None:
                cause = _cause(objective, batch, odd, before[odd.name])
                return [(odd.title, f"{UNSTEADY}{late(attempt)}: {cause}")]
            if other:
                about = f"the gradient of {other[-1]} is different for the same rows and seed"
                return [("model", f"{about}{late(attempt)}")]
    return []


def rewritten(objective: Objective, batch: Batch) -> str | None:
    """The parameter that a forward pass writes into; afterwards it is as before."""
    before = [(p.detach().clone(), p._version) for p in objective.model.parameters()]
    passed(objective, batch, 1)
    written = None
    named = objective.model.named_parameters()
    for (name, parameter), (value, version) in zip(named, before, strict=True):
        if parameter._version != version or not equal([parameter.detach()], [value]):
            written = written or name
            parameter.data.copy_(value)
    return written


def late(attempt: int) -> str:
    return " after many calls" if attempt >= MANY else ""


def _cause(objective: Objective, batch: Batch, odd: Call, before: dict[str, Any]) -> str:
    """Why a module is unsteady, as far as it can be told."""

    def is_steady(seeds: bool) -> bool:
        outputs = []
        for _ in range(2):
            if seeds:
                random.seed(0)
                np.random.seed(0)
            outputs.append(passed(objective, batch, 1))
        return first_to_differ(*outputs) is None

    if not is_steady(seeds=False) and is_steady(seeds=True):
        return "it draws from Python's or NumPy's random numbers; the pipeline seeds torch's"
    return kept_in(before, odd.module)


def kept_in(before: dict[str, Any], module: nn.Module) -> str:
    names = ", ".join(f"`{key}`" for key in _changed_attributes(before, module))
    if not names:
        return "it draws from a generator of its own, or keeps something from call to call"
    return f"it keeps {names} from call to call, outside its parameters and buffers"


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """What a module keeps besides parameters, buffers and modules, as far as it can be compared."""
    attributes: dict[str, Any] = {}
    for key, value in vars(module).items():
        if key.startswith("_") and key[1:] in ("parameters", "buffers", "modules"):
            continue
        if isinstance(value, bool | int | float | str | None):
            attributes[key] = value
        elif isinstance(value, Tensor):
            attributes[key] = value.detach().clone()
        elif isinstance(value, torch.Generator):
            attributes[key] = value.get_state()
        elif isinstance(value, np.random.Generator):
            attributes[key] = repr(value.bit_generator.state)
        elif isinstance(value, random.Random):
            attributes[key] = hash(value.getstate())
        elif isinstance(value, Sized) and not key.startswith("_"):
            attributes[key] = len(value)
    return attributes


def _changed_attributes(before: dict[str, Any], module: nn.Module) -> list[str]:
    """What the module keeps otherwise than before."""
    after = attributes_of(module)

    def same(one: Any, other: Any) -> bool:
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            return equal([one], [other])
        return type(one) is type(other) and not isinstance(one, Tensor) and one == other

    return [key for key, value in before.items() if not same(value, after.get(key))]
