"""What a loss is: one number per item, and how many items count.

A loss never reduces. `items` gives its unreduced numbers and `denominator` what their sum is
divided by; the training step sums both over all workers and micro-batches and divides once. The
denominator depends on the target alone, so it is known before the forward pass.

A loss that couples rows, such as a contrastive one, cannot be summed over parts. It declares itself
`per_batch`: the step then gathers its predictions and targets from all workers and micro-batches,
and it gives one number for the whole global batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from pipeline import registry
from pipeline.errors import UsageError
from pipeline.registry import Entry, lazy, nearest

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    torch = lazy("torch")
    nn = lazy("torch.nn")

TRUTHS = re.compile("targets?|truth|labels?|y|y_true|true")
PREDICTIONS = re.compile("pred.*|outputs?|logits?|scores?|inputs?|y_pred|y_hat")

PredictionKind = Literal[
    "values",  # any real number, in the target's unit
    "logits",  # before softmax or sigmoid
    "probabilities",  # in [0, 1]
    "log_probabilities",  # after log_softmax
    "log_rates",  # logarithm of an expected count
    "rates",  # an expected count, above 0
    "variances",  # at least 0
    "scores",  # larger means more likely; no other scale
    "features",  # input of a head that the loss owns
    "embeddings",  # vectors compared by distance or angle
    "any",
]
TargetKind = Literal[
    "values",  # float, any number
    "counts",  # float, at least 0
    "classes",  # int64 class numbers, or `ignore_index`
    "groups",  # int64: rows of one number belong together
    "binary",  # float in [0, 1]
    "signs",  # float, -1 or 1
    "distribution",  # float, probabilities over the prediction's classes
    "log_distribution",  # their logarithms
    "quantiles",  # float, any number, of which quantiles are predicted
    "survival",  # float [N, 2]: a time, and 1 if something happened then, 0 if it was not seen
    "class_lists",  # int64 [N, C]: class numbers, then -1
    "tokens",  # ragged int64: class numbers without the blank
    "none",  # the loss compares predictions only
    "any",
]
Shape = Literal["as_target", "classes", "rows", "numbers", "any"]
"""Prediction against target [N, d...]: the same shape; [N, C, d...]; [N, D]; [N]; unchecked."""

ACTIVATIONS: dict[str, tuple[PredictionKind, ...]] = {
    "identity": ("values", "logits", "log_rates", "scores", "features", "embeddings"),
    "sigmoid": ("probabilities",),
    "softmax": ("probabilities",),
    "log_softmax": ("log_probabilities",),
    "softplus": ("rates", "variances"),
    "exp": ("rates", "variances"),
    "normalize": ("embeddings",),
    "tanh": ("values", "scores"),
}
"""What each activation of a model output makes of it."""


@dataclass(frozen=True)
class Role:
    """One prediction a loss reads: its default output name, what it must be, how wide it is."""

    name: str = "prediction"
    kind: PredictionKind = "values"
    size: int | Literal["as_target", "classes"] = "as_target"
    activation: str = "identity"
    """Activation of a built-in model's output when the spec names none."""


@dataclass(frozen=True)
class Loss:
    """A criterion as numerator and denominator, what it expects, and its inverse link.

    `items(*predictions, *targets)` returns the unreduced numbers; their sum is the numerator.
    `denominator(num_rows, *targets)` returns what each row adds to the denominator, float64
    [num_rows]; it is None for a user's loss, whose number of items is then found by a trial on one
    batch (one per row, or per target element).
    """

    items: Callable[..., Tensor]
    denominator: Callable[..., Tensor] | None = None
    roles: tuple[Role, ...] = (Role(),)
    target: TargetKind = "values"
    shape: Shape = "as_target"
    link: Callable[..., Tensor] | None = None
    """From predictions to what is served: probabilities, rates, values. None: as they are."""
    ignore_index: int | None = None
    """Class number that marks items to leave out; padding of ragged class targets."""
    head: Callable[[int, int], nn.Module] | None = None
    """Makes the module of parameters the loss owns, from feature width and number of classes;
    `items` and `link` then take the module first."""
    module: nn.Module | None = None
    """Parameters of a user's loss, trained with the model."""
    levels: tuple[float, ...] = ()
    """What each number of a prediction is at: the levels of quantiles, or times."""
    blank: int | None = None
    """The class that no target names (ctc); the codes of tokens leave it out."""
    per_batch: bool = False
    """`items` takes all rows of the global batch and returns its mean loss, one number."""


Per = Literal["row", "element", "batch"]


def rows(num_rows: int, *targets: Tensor) -> Tensor:
    """One for each row: float64 [num_rows]."""
    return torch.ones(num_rows, dtype=torch.float64)


def elements(num_rows: int, *targets: Tensor) -> Tensor:
    """The elements that each row of the first target has: float64 [num_rows]."""
    each = targets[0].numel() / num_rows if num_rows else 0.0
    return torch.full((num_rows,), each, dtype=torch.float64)


def per_item(
    function: Callable[..., Tensor],
    *,
    per: Per | None = None,
    prediction: PredictionKind = "any",
    target: TargetKind = "any",
    link: Callable[..., Tensor] | None = None,
) -> Loss:
    """A Loss from a function of prediction and target giving one number per row or element.

    Without `per`, a trial on one batch tells which it is. With `per="batch"` the function takes all
    rows of the global batch and gives one number, its mean loss.
    """
    denominator = {"row": rows, "element": elements, "batch": rows, None: None}[per]
    roles = (Role(kind=prediction),)
    is_whole = per == "batch"
    return Loss(function, denominator, roles, target, "any", link, per_batch=is_whole)


def build(entry: Entry, options: dict[str, Any]) -> Loss:
    """The Loss of a registry entry.

    An entry is a function with options only, returning a Loss; or a function of prediction and
    target, giving one number per item; or an `nn.Module` class, with or without `reduction`.
    """
    import inspect

    parameters = inspect.signature(entry.build).parameters
    if inspect.isclass(entry.build) and issubclass(entry.build, nn.Module):
        unreduced = {"reduction": "none"} if "reduction" in parameters else {}
        module = entry.build(**{**options, **unreduced})
        return replace(_custom(entry, module), module=module)
    if any(p.kind not in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in parameters.values()):

        def with_options(*arguments: Tensor) -> Tensor:
            return entry.build(*arguments, **options)  # type: ignore[no-any-return]

        return _custom(entry, with_options)
    loss = entry.build(**options)
    if not isinstance(loss, Loss):
        from pipeline.errors import ContractError

        raise ContractError(
            entry.name,
            f"{entry.place} returned {type(loss).__name__}",
            "take (prediction, target) and return one number per item, or return a Loss",
        )
    return loss


def _refuse_swapped(entry: Entry) -> None:
    """Raise UsageError for a loss that calls its first argument the target."""
    import inspect

    call = getattr(entry.build, "forward", entry.build)  # of a module
    parameters = inspect.signature(call).parameters.values()
    names = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY and p.name != "self"]
    if len(names) > 1 and TRUTHS.fullmatch(names[0]) and PREDICTIONS.fullmatch(names[1]):
        raise UsageError(
            f"loss {entry.name} ({entry.place}): its arguments are ({', '.join(names[:2])}): they "
            "are given by position, the prediction first and the target second"
        )


def _custom(entry: Entry, function: Callable[..., Tensor]) -> Loss:
    """A user's loss, which reads anything unless it is registered as `like` another."""
    _refuse_swapped(entry)
    loss = per_item(function, per=entry.per)
    if entry.like is None:
        return loss
    if entry.like not in registry.losses.entries:
        raise UsageError(
            f"loss {entry.name} ({entry.place}): like={entry.like!r} is not a loss"
            f"{nearest(entry.like, registry.losses.entries)}"
        )
    model = build(registry.losses[entry.like], {})
    return replace(
        model, items=function, denominator=loss.denominator, head=None, per_batch=loss.per_batch
    )


register = registry.losses.register

__all__ = [
    "ACTIVATIONS",
    "Loss",
    "Per",
    "PredictionKind",
    "Role",
    "TargetKind",
    "build",
    "elements",
    "per_item",
    "register",
    "rows",
]
