"""Do loss, prediction and target belong together? Asked of real rows before training starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pipeline.data.batch import Batch, num_rows, select
from pipeline.errors import ContractError, UsageError
from pipeline.losses.modes import evaluating
from pipeline.losses.objective import Objective
from pipeline.losses.targets import Classes
from pipeline.losses.terms import Predictions, Term
from pipeline.probes.steadiness import draws


@dataclass(frozen=True)
class Notice:
    """Something that is allowed, but that its user should know."""

    about: str
    text: str

    def __str__(self) -> str:
        return f"{self.about}: {self.text}"


def check_batch(objective: Objective, batch: Batch) -> list[Notice]:
    """Put one real batch through model and losses, forward and backward, on the CPU.

    Raises ContractError with the fix; returns what is allowed but worth knowing.
    """
    with evaluating(objective):
        notices = _check_predictions(objective, batch)
    for term in objective.terms:
        if term.loss.per_batch:
            text = "needs the whole global batch: every step gathers it, and runs the model twice"
            notices.append(Notice(f"loss {term.label}", text))
    return notices + _check_parameters(objective, batch) + _check_model(objective)


def _check_predictions(objective: Objective, batch: Batch) -> list[Notice]:
    """Whether model and losses fit each other, and leave their inputs alone."""
    columns = {name: column for name, column in batch.items() if isinstance(column, Tensor)}
    with torch.no_grad():
        if written := _find_written(columns, lambda: objective.predict(batch)):
            raise UsageError(
                f"model {type(objective.model).__name__}: writes into the column {written!r} of "
                "its batch, which is read again: compute a new tensor"
            )
        predictions = objective.predict(batch)
    notices = []
    for index, term in enumerate(objective.terms):
        arguments = term.arguments(predictions, batch)
        _check_shape(term, arguments, num_rows(batch))
        notices += _check_kinds(term, arguments, objective.model)
        _check_width(term, arguments[0], objective.sizes[term.outputs[0]])
        _check_left_alone(objective, index, arguments)
        _check_items(objective, index, predictions, batch)
    return notices + _check_rows(objective, predictions, batch)


def _check_left_alone(objective: Objective, index: int, arguments: list[object]) -> None:
    term = objective.terms[index]
    names = [*term.outputs, *(field.name for field in term.targets)]
    tensors = {n: a for n, a in zip(names, arguments, strict=False) if isinstance(a, Tensor)}
    with torch.no_grad():
        written = _find_written(tensors, partial(objective.computed, index, arguments))
    if written:
        raise ContractError(
            term.label,
            f"writes into {written!r}, which other losses and metrics read after it",
            "compute a new tensor: a - b, not a.sub_(b)",
        )


def _find_written(tensors: dict[str, Tensor], call: Callable[[], object]) -> str | None:
    """The name of a tensor that the call writes into."""
    before = {name: tensor._version for name, tensor in tensors.items()}
    call()
    return next((n for n, version in before.items() if tensors[n]._version != version), None)


def _check_width(term: Term, prediction: Tensor, size: int | None) -> None:
    """A custom model gives as many classes, or features, as the loss was made for."""
    counted = term.loss.shape == "classes" or term.loss.head is not None or term.loss.levels
    if counted and prediction.dim() > 1 and prediction.shape[1] != size:
        raise ContractError(
            term.label,
            f"output {term.outputs[0]!r} gives {prediction.shape[1]} numbers per row, "
            f"{size} are expected",
            f"give as many, or set model.outputs.{term.outputs[0]}.size",
        )


def _check_rows(objective: Objective, predictions: dict[str, Tensor], batch: Batch) -> list[Notice]:
    """Whether the model's rows depend on each other, other than through a BatchNorm."""
    if drawing := draws(objective, batch, training=False):
        text = (
            f"{drawing} draws random numbers in evaluation too, as a dropout that is not told "
            "training=self.training: validation and the served model change with what is drawn"
        )
        return [Notice("model", text)]
    half = torch.arange(-(-num_rows(batch) // 2))
    with torch.no_grad():
        same = objective.predict(batch)
        again = objective.predict(select(batch, half))
    if any(not torch.equal(value, same[name]) for name, value in predictions.items()):
        text = (
            "gives different numbers for the same rows each time: `pipeline prove` names the module"
        )
        return [Notice("model", text)]
    for name, prediction in predictions.items():
        if name in again and not _close(again[name], prediction[half]):
            text = (
                f"output {name!r} of a row depends on the other rows of its batch: the curve "
                "depends on training.microbatch_size and on the number of workers"
            )
            return [Notice("model", text)]
    return []


def _shape(value: object) -> list[int]:
    return list(value.shape) if isinstance(value, Tensor) else ["lists"]  # type: ignore[list-item]


def _check_shape(term: Term, arguments: list[object], rows: int) -> None:
    num_outputs = len(term.outputs)
    predictions = [a for a in arguments[:num_outputs] if isinstance(a, Tensor)]
    target = arguments[num_outputs] if len(arguments) > num_outputs else None
    for name, prediction in zip(term.outputs, predictions, strict=True):
        if prediction.dim() == 0 or len(prediction) != rows:
            raise ContractError(
                term.label,
                f"output {name!r} has shape {_shape(prediction)} for {rows} rows",
                "keep rows as the first dimension of every output",
            )
    first = predictions[0]
    shape = term.loss.shape
    if shape == "rows" and first.dim() != 2:
        raise ContractError(
            term.label,
            f"output {term.outputs[0]!r} has shape {_shape(first)}, expected [rows, size]",
            "give one vector per row",
        )
    if not isinstance(target, Tensor):
        return
    if shape == "numbers" and first.dim() != 1:
        raise ContractError(
            term.label,
            f"output {term.outputs[0]!r} has shape {_shape(first)}, expected one number per row",
            "squeeze the last dimension of the output",
        )
    if shape == "as_target" and first.shape != target.shape:
        squeeze = first.dim() == target.dim() + 1 and first.shape[-1] == 1
        raise ContractError(
            term.label,
            f"output {term.outputs[0]!r} has shape {_shape(first)}, the target {_shape(target)}: "
            "they would be broadcast into wrong numbers",
            "squeeze the last dimension of the output" if squeeze else "make the shapes equal",
        )
    if shape == "classes":
        wanted = [target.shape[0], "classes", *target.shape[1:]]
        if first.dim() != target.dim() + 1 or first.shape[2:] != target.shape[1:]:
            raise ContractError(
                term.label,
                f"output {term.outputs[0]!r} has shape {_shape(first)}, expected {wanted}",
                "classes stand in dimension 1, before positions",
            )
        if first.shape[1] == 1:
            raise ContractError(
                term.label,
                "one class only: the loss is always 0",
                "for yes or no use bce_with_logits; for classes give one output per class",
            )


def _check_kinds(term: Term, arguments: list[object], model: nn.Module) -> list[Notice]:
    """Prediction and target by their numbers."""
    declared = type(model).__module__.startswith("pipeline.models.")
    notices = []
    num_outputs = len(term.outputs)
    target = arguments[num_outputs] if len(arguments) > num_outputs else None
    for name, role, value in zip(term.outputs, term.loss.roles, arguments, strict=False):
        if not isinstance(value, Tensor) or not value.numel():
            continue
        low = float(value.min())
        high = float(value.max())
        where = f"output {name!r}"
        if role.kind == "logits" and role.size == "classes" and _sums_to_one(value) and low >= 0:
            raise ContractError(
                term.label,
                f"{where} is already a softmax (each row sums to 1); this loss takes logits",
                "leave the softmax out of the model, or use nll on log_softmax",
            )
        if (
            role.kind == "logits"
            and role.size != "classes"
            and low >= 0
            and high <= 1
            and len(value) > 7
            and not declared
        ):
            notices.append(
                Notice(
                    f"loss {term.label}",
                    f"every value of {where} is between 0 and 1: if the model ends in a sigmoid, "
                    "use bce, since this loss applies it itself",
                )
            )
        if role.kind == "log_probabilities" and not _sums_to_one(value.exp()):
            raise ContractError(
                term.label,
                f"{where} is not a log_softmax (values from {low:.3g} to {high:.3g})",
                "end the model in log_softmax, or use cross_entropy on logits",
            )
        if role.kind == "probabilities" and (low < 0 or high > 1):
            raise ContractError(
                term.label,
                f"{where} has values from {low:.3g} to {high:.3g}, expected probabilities",
                "end the model in a sigmoid, or use bce_with_logits on logits",
            )
        if role.kind in ("variances", "rates") and low < 0:
            raise ContractError(
                term.label,
                f"{where} has negative values ({low:.3g}), expected {role.kind}",
                "end this output in softplus or exp",
            )
    if isinstance(term.target, Classes) and isinstance(target, Tensor):
        prediction = arguments[0]
        classes = target[target != term.loss.ignore_index]
        if (
            isinstance(prediction, Tensor)
            and classes.numel()
            and term.loss.shape == "classes"
            and not 0 <= int(classes.min()) <= int(classes.max()) < prediction.shape[1]
        ):
            raise ContractError(
                term.label,
                f"target {term.targets[0].name!r} has class numbers {int(classes.min())} to "
                f"{int(classes.max())}, the model gives {prediction.shape[1]} classes",
                "leave model.outputs' size to be inferred, or make it larger",
            )
    return notices


def _sums_to_one(values: Tensor) -> bool:
    sums = values.sum(1)
    return torch.allclose(sums, torch.ones_like(sums), atol=1e-4)


def _check_items(
    objective: Objective, index: int, predictions: dict[str, Tensor], batch: Batch
) -> None:
    """The items are finite, as many as the denominator says, and do not depend on each other."""
    term = objective.terms[index]
    rows = num_rows(batch)

    def items(of: Predictions, chosen: Tensor) -> Tensor:
        parts = {name: value[chosen] for name, value in of.items()}
        return objective.items_of(index, parts, select(batch, chosen))

    with torch.no_grad():
        everything = torch.arange(rows)
        whole = items(predictions, everything)
        if term.loss.per_batch and whole.dim() != 0:
            raise ContractError(
                term.label,
                f"is declared per batch, and gives shape {list(whole.shape)}",
                "return the mean loss of all rows given, one number",
            )
        if whole.dim() == 0 and not term.loss.per_batch:
            raise ContractError(
                term.label,
                f"gives one number for {rows} rows: a loss gives one per row or per target "
                "element, the mean is taken over all workers",
                'leave out .mean() or .sum(); or register it with per="batch" if it needs all rows',
            )
        if not bool(torch.isfinite(whole).all()):
            fix = (
                "a target longer than its prediction is infinite: zero_infinity: true skips it"
                if term.loss.blank is not None
                else "scale the inputs, or look for infinite values in the target"
            )
            raise ContractError(term.label, "is not finite on the first rows", fix)
        if term.loss.per_batch:
            return
        if not _close(items(predictions, everything), whole):
            raise ContractError(
                term.label,
                "gives other numbers for the same predictions and targets each time",
                "draw random numbers in the model, where they follow the seed; not in the loss",
            )
        for chosen in (everything[: -(-rows // 2)], everything[rows // 2 :], everything.flip(0)):
            if len(whole) == rows and not _close(items(predictions, chosen), whole[chosen]):
                raise ContractError(
                    term.label,
                    "gives different numbers for the same rows in another batch: it couples the "
                    "rows of a batch, so no split over workers or micro-batches can be exact",
                    "give each row a number that depends on that row alone; or one number for the "
                    'batch, and register it with per="batch"',
                )


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-3, atol=1e-5 * float(other.abs().max().clamp(min=1)))


def _check_parameters(objective: Objective, batch: Batch) -> list[Notice]:
    trained = [name for name, p in objective.named_parameters() if p.requires_grad]
    if not trained:
        raise ContractError(
            objective.terms[0].label,
            "the model has no parameter to train",
            "leave some out of model.freeze; a module that is to learn needs parameters with "
            "requires_grad=True",
        )
    predictions = objective.predict(batch)
    for term, items in zip(objective.terms, objective.items(predictions, batch), strict=True):
        if not items.requires_grad:
            raise ContractError(
                term.label,
                "carries no gradient back to the model",
                "leave out .detach(), .item(), torch.no_grad() and numpy in loss and model",
            )
    objective(batch)[0].sum().backward()
    idle = [name for name, p in objective.named_parameters() if p.requires_grad and p.grad is None]
    objective.zero_grad(set_to_none=True)
    if idle:
        return [Notice("model", f"no loss reaches the parameters {', '.join(idle[:5])}")]
    return []


def _check_model(objective: Objective) -> list[Notice]:
    normed = [
        name
        for name, module in objective.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
    ]
    if not normed:
        return []
    return [
        Notice(
            "model",
            f"{normed[0]} is a BatchNorm: its statistics are those of one micro-batch, so the "
            "curve depends on training.microbatch_size, and without it on the number of workers; "
            "use GroupNorm or LayerNorm for one curve everywhere",
        )
    ]
