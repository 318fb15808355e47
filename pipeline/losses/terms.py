"""The losses of one job: bound to model outputs and target columns, and summed by weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import registry
from pipeline.data.batch import Batch, Column, num_rows
from pipeline.data.columns import IGNORED, Field, Reading
from pipeline.errors import ContractError
from pipeline.losses.contract import ACTIVATIONS, Loss, Role, build
from pipeline.losses.targets import TARGETS, Target
from pipeline.losses.targets.base import some_of
from pipeline.registry import nearest
from pipeline.spec import JobSpec
from pipeline.spec import Term as TermSpec
from pipeline.spec.section import yaml_text
from pipeline.tracebacks import describe, own_frames

Predictions = Mapping[str, Tensor]


@dataclass(frozen=True)
class Output:
    """One model output: `size` numbers per row, or one number without a dimension of its own."""

    name: str
    size: int | None
    activation: str


@dataclass(frozen=True)
class Term:
    """A loss that knows its outputs, its target columns and its weight in the sum."""

    label: str
    weight: float
    loss: Loss
    outputs: tuple[str, ...]
    targets: tuple[Field, ...]
    threshold: Tensor | None = None
    """Probability above which yes is predicted, for each column, where it is not a half."""

    def arguments(self, predictions: Predictions, batch: Batch) -> list[Any]:
        """Predictions, then targets, as the loss takes them; predictions in full precision."""
        read = self.read(predictions)
        return [*read, *self.truth(batch, read[0])]

    def read(self, predictions: Predictions) -> list[Tensor]:
        """The outputs that the loss reads, in its order and in full precision."""
        return [self._prediction(predictions, name) for name in self.outputs]

    def _prediction(self, predictions: Predictions, name: str) -> Tensor:
        if name not in predictions:
            raise ContractError(
                self.label,
                f"the model gives no output {name!r}, only {', '.join(predictions)}",
                f"return it, or name another with `prediction:`{nearest(name, predictions)}",
            )
        prediction = predictions[name]
        low = prediction.dtype in (torch.bfloat16, torch.float16)
        return prediction.float() if low else prediction

    @property
    def target(self) -> Target:
        """The kind of target that the loss reads."""
        return TARGETS[self.loss.target]

    def truth(self, batch: Batch, prediction: Tensor | None = None) -> list[Column]:
        """Targets as the loss takes them; class lists padded to the prediction's positions."""
        columns = [batch[field.name] for field in self.targets]
        return self.target.arguments(self, columns, prediction)

    def denominator(self, batch: Batch) -> Tensor:
        """What each row adds to the denominator of this term: float64 [N]."""
        assert self.loss.denominator is not None, "resolved when an objective is constructed"
        rows = num_rows(batch)
        counts = self.loss.denominator(rows, *self.truth(batch))
        if counts.shape != (rows,):
            raise ContractError(
                self.label,
                f"its denominator gives shape {list(counts.shape)} for {rows} rows",
                "return what each row adds to it: float64 [num_rows]",
            )
        return counts

    def served(self, head: nn.Module | None, predictions: Predictions) -> Tensor:
        """The prediction on the target's scale: probabilities, rates or values."""
        read = self.read(predictions)
        if self.loss.link is None:
            return read[0]
        return self.loss.link(*([head] if head is not None else []), *read)


def readings(spec: JobSpec) -> dict[str, Reading]:
    """How the losses read each target column."""
    losses: dict[str, list[tuple[str, Loss]]] = {}
    for label, term in zip(spec.labels, spec.loss, strict=True):
        options = {k: None if _is_open(k, v) else v for k, v in term.options.items()}
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
        options = _with_class_weights(label, term.options, bound)
        if "ignore_index" in options:
            _check_ignored(label, options["ignore_index"], bound)
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


def _with_class_weights(
    label: str, options: dict[str, Any], fields: tuple[Field, ...]
) -> dict[str, Any]:
    """The options with weights that are `balanced` or given by label as plain numbers."""
    options = options | _ranks(label, options, fields)
    open_options = {k: v for k, v in options.items() if _is_open(k, v)}
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
    resolved = {}
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
        resolved[option] = [value[name] for name in vocabulary] if by_label else balanced[option]
    return options | resolved


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


def _is_open(option: str, value: Any) -> bool:
    """Whether an option's value has to be looked up in the target column."""
    is_weight = option in ("class_weight", "pos_weight")
    return is_weight and (value == "balanced" or isinstance(value, dict))


def _check_ignored(label: str, ignore_index: int, fields: tuple[Field, ...]) -> None:
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


def num_classes(term: Term) -> int:
    """Classes of the term's target in the training rows."""
    return term.targets[0].num_codes if term.targets else 0


def check_targets(terms: list[Term], rows: Batch) -> None:
    """Refuse targets that a loss cannot mean; `rows` are the target columns of all rows."""
    for term in terms:
        for truth in term.truth(rows)[:1]:
            if isinstance(truth, Tensor) and truth.numel():
                term.target.check_values(term.label, term.targets[0].name, truth)
