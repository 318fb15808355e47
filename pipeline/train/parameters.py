"""Parameters that a spec names by pattern: which start from trained weights, which are trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from pipeline.errors import UsageError
from pipeline.models.lora import adapt
from pipeline.registry import nearest
from pipeline.spec.components import InitFrom, Lora, Optimizer
from pipeline.spec.components import Model as ModelChoice

BIASES_AND_NORMS = "biases_and_norms"
MAX_NAMED = 3
"""Names that an error gives of many."""


def find(names: Iterable[str], patterns: Sequence[str], key: str) -> list[str]:
    """Those of the names that a pattern of the spec's `key` matches, itself or a module above them.

    Raises UsageError for a pattern that matches none.
    """
    known = list(names)
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in known):
            modules = {name[:end] for name in known for end in _ends(name)}
            some = ", ".join(sorted(known)[:8]) + ", ..." * (len(known) > 8)
            raise UsageError(
                f"{key}: {pattern!r} matches nothing{nearest(pattern, modules)} "
                f"(there {'is' if len(known) == 1 else 'are'}: {some or 'none'})"
            )
    return [name for name in known if any(_matches(name, pattern) for pattern in patterns)]


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _ends(name: str) -> list[int]:
    return [place for place, letter in enumerate(name) if letter == "."] + [len(name)]


def initialise(model: nn.Module, weights: Mapping[str, Tensor], init_from: InitFrom) -> None:
    """Give the model trained weights, by name, all or those that a pattern matches.

    Raises UsageError for names that one side lacks, and for shapes that differ.
    """
    own = model.state_dict()
    source = f"model.init_from: {init_from.weights}"
    chosen = list(own)
    if init_from.match is None:
        _refuse(source, "has more than the model:", weights.keys() - own.keys())
    else:
        chosen = find(own, init_from.match, "model.init_from.match")
    taken = {_memory(own[name]) for name in chosen if name in weights}
    lacking = [name for name in chosen if name not in weights]
    _refuse(source, "lacks", [name for name in lacking if _memory(own[name]) not in taken])
    chosen = [name for name in chosen if name in weights]  # the others are tied to these
    different = [
        f"{name} is {list(weights[name].shape)}, {list(own[name].shape)} in the model"
        for name in chosen
        if isinstance(own[name], Tensor) and weights[name].shape != own[name].shape
    ]
    _refuse(source, "has other shapes:", different)
    odd = [name for name in chosen if _is_odd(weights[name], own[name])]
    _refuse(source, "has other kinds of numbers in", odd)
    model.load_state_dict({**own, **{name: weights[name] for name in chosen}})


def _is_odd(given: Tensor, own: Any) -> bool:
    """Whether numbers of one kind would have to become numbers of another."""
    kinds = [(t.is_complex(), t.is_floating_point()) for t in (given, own) if isinstance(t, Tensor)]
    return len(set(kinds)) > 1


def _memory(tensor: Any) -> int | None:
    """Where a tensor's numbers are, by which tied parameters are known."""
    return tensor.data_ptr() if isinstance(tensor, Tensor) and tensor.numel() else None


def _refuse(source: str, problem: str, names: Iterable[str]) -> None:
    """Raise UsageError if there are any."""
    if faults := sorted(names):
        more = f" and {len(faults) - MAX_NAMED} more" if len(faults) > MAX_NAMED else ""
        advice = "; `match` takes a part of the weights by pattern"
        raise UsageError(f"{source} {problem} {', '.join(faults[:MAX_NAMED])}{more}{advice}")


def choose_trained(model: nn.Module, spec: ModelChoice) -> None:
    """Freeze what the spec freezes, and adapt the layers that it adapts."""
    named = dict(model.named_parameters(remove_duplicate=False))
    frozen = set(find(named, spec.freeze, "model.freeze"))
    for name in frozen:
        named[name].requires_grad_(False)
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        own = [prefix + name for name, _ in module.named_parameters(recurse=False)]
        is_named = any(_matches(path, pattern) for pattern in spec.freeze)
        is_frozen = is_named or (own and frozen.issuperset(own))
        if is_frozen and next(module.buffers(recurse=False), None) is not None:
            module.training = False  # running statistics stay as they are
    if spec.lora:
        _adapt(model, spec.lora)


def _adapt(model: nn.Module, lora: Lora) -> None:
    layers = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    parameters = [p for _, p in model.named_parameters(remove_duplicate=False)]
    for name in find(layers, lora.match, "model.lora.match"):
        if "weight" not in layers[name]._parameters:
            raise UsageError(
                f"model.lora.match: {name} computes its weight itself, as weight_norm does: leave "
                "this layer out"
            )
        if sum(p is layers[name].weight for p in parameters) > 1:
            raise UsageError(
                f"model.lora.match: the weight of {name} is tied to another layer's, which an "
                "adapter would change too: leave this layer out"
            )
        width = min(layers[name].weight.shape)
        if lora.rank > width:
            raise UsageError(
                f"model.lora.rank: {lora.rank} is more than {width}, the rank that the weight of "
                f"{name} has at most"
            )
        adapt(layers[name], lora.rank, lora.alpha)


def groups(
    named: Iterable[tuple[str, nn.Parameter]], optimizer: Optimizer
) -> list[dict[str, Any]] | list[nn.Parameter]:
    """The parameters that are trained, as an optimizer takes them: first those in no group.

    Their names may begin with `model.`, as in an `Objective`. Raises UsageError for a group that is
    empty.
    """
    trained = [(name.removeprefix("model."), p) for name, p in named if p.requires_grad]
    if not optimizer.groups:
        return [p for _, p in trained]
    left, made = trained, []
    for index, group in enumerate(optimizer.groups):
        key = f"optimizer.groups.{index}.match"
        patterns = [pattern for pattern in group.match if pattern != BIASES_AND_NORMS]
        chosen = set(find((name for name, _ in trained), patterns, key))
        if BIASES_AND_NORMS in group.match:
            chosen |= {name for name, p in trained if p.dim() < 2}
        members = [p for name, p in left if name in chosen]
        left = [(name, p) for name, p in left if name not in chosen]
        if not members:
            raise UsageError(f"{key}: all parameters that it matches are in groups before it")
        made.append({"params": members, **group.options})
    return [*([{"params": [p for _, p in left]}] if left else []), *made]
