"""The spec's losses bound to the data's columns: how targets are read, the terms, their outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline import registry
from pipeline.data.columns import IGNORED, Field, Reading
from pipeline.errors import ContractError
from pipeline.losses.contract import ACTIVATIONS, Loss, Role, build
from pipeline.losses.options import check_ignored, is_open, resolved
from pipeline.losses.targets import TARGETS
from pipeline.losses.terms import Term, num_classes
from pipeline.spec import JobSpec
from pipeline.spec import Term as TermSpec
from pipeline.tracebacks import describe, own_frames


@dataclass(frozen=True)
class Output:
    """One model output: `size` numbers per row, or one number without a dimension of its own."""

    name: str
    size: int | None
    activation: str


def readings(spec: JobSpec) -> dict[str, Reading]:
    """How the losses read each target column."""
    losses: dict[str, list[tuple[str, Loss]]] = {}
    for label, term in zip(spec.labels, spec.loss, strict=True):
        options = {k: None if is_open(k, v) else v for k, v in term.options.items()}
        loss = _built(label, term.name, options)
        for name in _target_names(term, spec) if loss.target != "none" else ():
            losses.setdefault(name, []).append((label, loss))
    return {name: _reading(name, readers) for name, readers in losses.items()}


def _built(label: str, name: str, options: dict[str, Any]) -> Loss:
    """The loss of a term. Raises ContractError for options that it refuses."""
    try:
        return build(registry.losses[name], options)
    except (TypeError, ValueError) as error:
        text = describe(error) if own_frames(error) else str(error)
        raise ContractError(label, text, "see `pipeline list losses`") from error


def _reading(target: str, losses: Sequence[tuple[str, Loss]]) -> Reading:
    """How labelled losses read one target column together."""
    kinds = [TARGETS[loss.target] for _, loss in losses]
    return Reading(
        as_classes=any(kind.is_class for kind in kinds),
        as_amounts=all(kind.is_amount for kind in kinds),
        as_float64=any(kind.needs_float64 for kind in kinds),
        ignored=_ignored(target, losses),
        is_declared=all(kind.is_declared for kind in kinds),
    )


def _ignored(target: str, losses: Sequence[tuple[str, Loss]]) -> int | None:
    """The value of the column that marks items to leave out, which all its losses must be able to.

    A value that the spec gives goes before torch's default, -100. Raises ContractError where losses
    disagree.
    """
    label_by_mark = {loss.ignore_index: label for label, loss in losses}
    unable = label_by_mark.pop(None, None)
    given = [mark for mark in label_by_mark if mark != IGNORED]
    if len(given) > 1:
        one, other = given[:2]
        raise ContractError(
            label_by_mark[other],
            f"ignore_index {other} and, in {label_by_mark[one]}, {one} both mark items of target "
            f"{target!r}",
            "give all losses that read it the same value",
        )
    if given and unable:
        raise ContractError(
            unable,
            f"reads target {target!r}, in which ignore_index {given[0]} of "
            f"{label_by_mark[given[0]]} marks items to leave out; it cannot leave items out",
            "take these rows out of the data, or give this loss a column of its own",
        )
    return None if unable else next(iter([*given, *label_by_mark]), None)


def _target_names(term: TermSpec, spec: JobSpec) -> list[str]:
    if term.target is not None:
        return [term.target] if isinstance(term.target, str) else term.target
    return spec.data.targets


def bind(spec: JobSpec, fields: list[Field]) -> list[Term]:
    """The spec's loss terms over the data's targets. Raises ContractError with the fix."""
    targets = {field.name: field for field in fields if field.is_target}
    terms = []
    for label, term in zip(spec.labels, spec.loss, strict=True):
        names = _target_names(term, spec)
        bound = tuple(targets[name] for name in names)
        options = resolved(label, term.options, bound)
        if "ignore_index" in options:
            check_ignored(label, options["ignore_index"], bound)
            options = options | {"ignore_index": IGNORED}  # as the column is encoded
        loss = _built(label, term.name, options)
        if loss.target == "none":
            bound = ()
        elif not bound:
            raise ContractError(
                label, f"needs a target ({loss.target}), found none", "name one in data.target"
            )
        outputs = tuple(role.name for role in loss.roles)
        if term.prediction is not None:
            outputs = (
                (term.prediction,) if isinstance(term.prediction, str) else tuple(term.prediction)
            )
        if len(outputs) != len(loss.roles):
            wanted = ", ".join(role.name for role in loss.roles)
            raise ContractError(
                label,
                f"reads {len(loss.roles)} predictions ({wanted}), the spec names {len(outputs)}",
                "give `prediction:` as a list in that order",
            )
        bound_term = Term(label, term.weight, loss, outputs, bound)
        bound_term.target.check_fields(label, bound)
        terms.append(bound_term)
    return terms


def outputs(terms: list[Term], spec: JobSpec) -> dict[str, Output]:
    """The model outputs that the terms read, with size and activation: declared or inferred.

    Raises ContractError where an activation is not what a loss takes, or two losses disagree.
    """
    declared = spec.model.outputs
    by_name: dict[str, Output] = {}
    for term in terms:
        for role, name in zip(term.loss.roles, term.outputs, strict=True):
            setting = declared.get(name)
            size = setting.size if setting and setting.size else _size(role, term)
            activation = (setting.activation if setting else None) or role.activation
            if role.kind not in ("any", *ACTIVATIONS[activation]):
                raise ContractError(
                    term.label,
                    f"reads {role.kind}, but output {name!r} has the activation {activation}",
                    f"set model.outputs.{name}.activation to {role.activation}"
                    if setting
                    else f"give the losses different outputs with `prediction:`, not both {name!r}",
                )
            output = Output(name, size, activation)
            known = by_name.setdefault(name, output)
            if known != output and role.kind != "any":
                raise ContractError(
                    term.label,
                    f"output {name!r}: {_describe(output)}; another loss: {_describe(known)}",
                    f"name another output with `prediction:`, or set model.outputs.{name}",
                )
    for name in declared:
        if name not in by_name:
            raise ContractError(
                terms[0].label,
                f"model.outputs.{name}: no loss reads it; the losses read {', '.join(by_name)}",
                "take it out, or name it in a loss's `prediction:`",
            )
    return by_name


def _describe(output: Output) -> str:
    return f"{output.size or 1} number(s) per row, activation {output.activation}"


def _size(role: Role, term: Term) -> int | None:
    if isinstance(role.size, int):
        return role.size
    if role.size == "classes":
        blank = 0 if term.loss.blank is None else 1
        return max(num_classes(term) + blank, 1)
    if term.target.sets_prediction_width and term.targets:
        if len(term.targets) > 1:
            return len(term.targets)
        return int(torch.tensor(term.targets[0].shape).prod()) if term.targets[0].shape else None
    return None
