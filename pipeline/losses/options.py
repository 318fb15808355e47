"""A loss's options that name classes of the target, as numbers: weights by label, an order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.data.columns import IGNORED, Field
from pipeline.errors import ContractError
from pipeline.losses.targets.base import some_of
from pipeline.registry import nearest
from pipeline.spec.section import yaml_text


def resolved(label: str, options: dict[str, Any], fields: tuple[Field, ...]) -> dict[str, Any]:
    """The options with weights that are `balanced` or given by label as plain numbers."""
    options = options | _ranks(label, options, fields)
    open_options = {k: v for k, v in options.items() if is_open(k, v)}
    if not open_options:
        return options
    if not fields:
        raise ContractError(label, "needs a target, found none", "name one in data.target")
    if open_options == {"pos_weight": "balanced"} and (shares := _shares_of_yes(fields)):
        if odd := [name for name, share in shares if not 0 < share < 1]:
            problem = f"pos_weight: target {odd[0]!r} has one value in all training rows"
            raise ContractError(label, problem, "check data.target and the training rows")
        weights = [(1 - share) / share for _, share in shares]
        return options | {"pos_weight": weights if len(weights) > 1 else weights[0]}
    field = fields[0] if len(fields) == 1 else None
    if field is None or not field.counts:
        raise ContractError(
            label,
            f"{', '.join(open_options)}: weights by label and `balanced` need one class column",
            "give the weights as a list",
        )
    if 0 in field.counts:
        raise ContractError(
            label,
            f"{', '.join(open_options)}: target {field.name!r} has one value in all training rows",
            "check data.target and the training rows",
        )
    counts = field.counts
    values = field.vocabulary or (0, 1)
    are_flags = isinstance(values[0], bool)  # which YAML writes true and false, Python True, False
    vocabulary = [yaml_text(value) for value in values]
    balanced: dict[str, Any] = {
        "class_weight": [sum(counts) / (len(counts) * count) for count in counts],
        "pos_weight": counts[0] / counts[-1],
    }
    by_option = {}
    for option, value in open_options.items():
        if are_flags and isinstance(value, dict):
            value = {name.lower(): weight for name, weight in value.items()}
        if isinstance(value, dict) and set(value) != set(vocabulary):
            raise ContractError(
                label,
                f"{option} names {', '.join(value)}; the classes are {', '.join(vocabulary)}"
                + next((nearest(one, vocabulary) for one in value if one not in vocabulary), ""),
                "give each class its weight",
            )
        by_label = isinstance(value, dict)
        by_option[option] = [value[name] for name in vocabulary] if by_label else balanced[option]
    return options | by_option


def _shares_of_yes(fields: Sequence[Field]) -> list[tuple[str, float]]:
    """Each label's name and its share of yes in the training rows; nothing for other targets.

    Labels are several columns of yes and no, or the positions of one column of 0 and 1.
    """
    if len(fields) == 1 and isinstance(fields[0].center, tuple):
        field = fields[0]
        return [(f"{field.name}[{place}]", share) for place, share in enumerate(fields[0].center)]
    if len(fields) < 2 or not all(field.counts and len(field.counts) == 2 for field in fields):
        return []
    return [(f.name, f.counts[1] / sum(f.counts)) for f in fields if f.counts]


def _ranks(label: str, options: dict[str, Any], fields: tuple[Field, ...]) -> dict[str, Any]:
    """Places of the classes in the `class_order`, in the order of their codes; of a loss that has
    such an option."""
    vocabulary = fields[0].vocabulary if fields else None
    if "class_order" not in options or vocabulary is None:
        return {}
    names = [yaml_text(value) for value in vocabulary]
    if options["class_order"] is None:
        if isinstance(vocabulary[0], str):
            fix = f"give class_order, the lowest first, of {', '.join(names)}"
            raise ContractError(label, f"text has no order, as {some_of(fields[0])}", fix)
        return {}
    order = [yaml_text(value) for value in options["class_order"]]
    if sorted(order) != sorted(names):
        problem = f"class_order names {', '.join(order)}; the classes are {', '.join(names)}"
        raise ContractError(label, problem, "name each class once, the lowest first")
    return {"class_order": [order.index(name) for name in names]}


def is_open(option: str, value: Any) -> bool:
    """Whether an option's value has to be looked up in the target column."""
    is_weight = option in ("class_weight", "pos_weight")
    return is_weight and (value == "balanced" or isinstance(value, dict))


def check_ignored(label: str, ignore_index: int, fields: tuple[Field, ...]) -> None:
    """Only whole numbers can be ignored by number, and only if the column was read so."""
    for field in fields:
        vocabulary = field.vocabulary or (0,)
        if ignore_index != IGNORED and isinstance(vocabulary[0], str | bool):
            held = "text" if isinstance(vocabulary[0], str) else "true and false"
            raise ContractError(
                label,
                f"ignore_index {ignore_index} names a whole number, target {field.name!r} holds "
                f"{held}",
                "take the rows out, or store the classes as whole numbers",
            )
        if field.vocabulary and ignore_index in field.vocabulary:
            raise ContractError(
                label,
                f"leaves items of {ignore_index} out (ignore_index), but in target {field.name!r} "
                "another loss reads them",
                "give the losses columns of their own, or the same ignore_index",
            )
