"""Losses of classes: one of many, yes or no, many at once, and distributions over classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from pipeline.losses.contract import Loss, Role, elements, register, rows
from pipeline.registry import lazy

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn
else:
    torch = lazy("torch")
    F = lazy("torch.nn.functional")
    nn = lazy("torch.nn")

Factor = Annotated[float, Field(ge=0)]
ClassWeight = list[Factor] | dict[str, Factor] | Literal["balanced"] | None
"""A factor per class: by label, in the order of the sorted labels, or `balanced`, which is
rows / (classes * rows of the class)."""
Order = Annotated[list[str | bool | int], Field(min_length=1)]
Smoothing = Annotated[float, Field(ge=0, le=1)]


def _like(prediction: Tensor, weight: Any) -> Tensor | None:
    return None if weight is None else prediction.new_tensor(weight)


def per_class(prediction: Tensor, weight: Any) -> Tensor | None:
    """The weights, checked against the number of classes where torch would only say 'size'."""
    weights = _like(prediction, weight)
    if weights is not None and weights.numel() != prediction.shape[1]:
        raise ValueError(
            f"{weights.numel()} class weights for {prediction.shape[1]} classes (dimension 1)"
        )
    return weights


def counted(class_weight: Any, ignore_index: int) -> Any:
    """Denominator of class losses: the weights of each row's items that are not ignored."""

    def denominator(num_rows: int, target: Tensor) -> Tensor:
        is_counted = target != ignore_index
        counts = is_counted.double()
        if class_weight is not None:
            weight = torch.tensor(class_weight, dtype=torch.float64, device=target.device)
            counts = weight[target.where(is_counted, 0)] * counts
        return counts.flatten(1).sum(1) if counts.dim() > 1 else counts

    return denominator


@register("cross_entropy")
def cross_entropy(
    *,
    class_weight: ClassWeight = None,
    ignore_index: int = -100,
    label_smoothing: Smoothing = 0.0,
    soft_targets: bool = False,
) -> Loss:
    """One class of many, from logits [N, C, ...]. Mean over the weights of counted items.

    With `soft_targets` the target holds a probability per class, and the mean is over rows (and
    positions), whatever the weights, as in torch.
    """

    def items(prediction: Tensor, truth: Tensor) -> Tensor:
        return F.cross_entropy(
            prediction,
            truth,
            weight=per_class(prediction, class_weight),
            ignore_index=ignore_index,
            reduction="none",
            label_smoothing=label_smoothing,
        )

    def positions(num_rows: int, truth: Tensor) -> Tensor:
        return elements(num_rows, truth) / truth.shape[1]

    def link(prediction: Tensor) -> Tensor:
        return prediction.softmax(1)

    if soft_targets:
        return Loss(items, positions, (Role(kind="logits"),), "distribution", link=link)
    role = Role(kind="logits", size="classes")
    denominator = counted(class_weight, ignore_index)
    return Loss(items, denominator, (role,), "classes", "classes", link, ignore_index)


@register("nll")
def nll(*, class_weight: ClassWeight = None, ignore_index: int = -100) -> Loss:
    """One class of many, from log-probabilities. Mean over the weights of counted items."""

    def items(prediction: Tensor, target: Tensor) -> Tensor:
        weight = per_class(prediction, class_weight)
        return F.nll_loss(
            prediction, target, weight=weight, ignore_index=ignore_index, reduction="none"
        )

    role = Role(kind="log_probabilities", size="classes", activation="log_softmax")
    denominator = counted(class_weight, ignore_index)
    return Loss(items, denominator, (role,), "classes", "classes", torch.exp, ignore_index)


@register("linear_cross_entropy")
def linear_cross_entropy(
    *,
    in_features: Annotated[int, Field(gt=0)] = 64,
    bias: bool = False,
    class_weight: ClassWeight = None,
    ignore_index: int = -100,
    label_smoothing: Smoothing = 0.0,
) -> Loss:
    """Cross-entropy that owns its last linear layer: `features` [N, in_features] to classes."""

    def head(width: int, num_classes: int) -> nn.Module:
        return nn.LinearCrossEntropyLoss(
            width,
            num_classes,
            bias=bias,
            reduction="none",
            weight=None if class_weight is None else torch.tensor(class_weight),
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )

    def items(module: nn.Module, prediction: Tensor, target: Tensor) -> Tensor:
        return module(prediction, target)  # type: ignore[no-any-return]

    def link(module: Any, prediction: Tensor) -> Tensor:
        return module.linear(prediction).softmax(1)  # type: ignore[no-any-return]

    return Loss(
        items,
        counted(class_weight, ignore_index),
        (Role("features", "features", in_features),),
        "classes",
        "rows",
        link,
        ignore_index,
        head,
    )


@register("adaptive_log_softmax")
def adaptive_log_softmax(
    *,
    cutoffs: list[Annotated[int, Field(gt=0)]],
    in_features: Annotated[int, Field(gt=0)] = 64,
    div_value: Annotated[float, Field(gt=0)] = 4.0,
    head_bias: bool = False,
) -> Loss:
    """Very many classes, frequent ones first; owns its layers (AdaptiveLogSoftmaxWithLoss)."""

    def head(width: int, num_classes: int) -> nn.Module:
        return nn.AdaptiveLogSoftmaxWithLoss(
            width, num_classes, cutoffs, div_value=div_value, head_bias=head_bias
        )

    def items(module: nn.Module, prediction: Tensor, target: Tensor) -> Tensor:
        if not len(target):  # torch's own forward refuses an empty batch
            return prediction.sum(1)
        return -module(prediction, target).output  # type: ignore[no-any-return]

    def link(module: Any, prediction: Tensor) -> Tensor:
        return module.log_prob(prediction).exp()  # type: ignore[no-any-return]

    role = Role("features", "features", in_features)
    return Loss(items, rows, (role,), "classes", "rows", link, head=head)


@register("distillation")
def distillation(*, temperature: Annotated[float, Field(gt=0)] = 2.0) -> Loss:
    """A teacher's probabilities [N, C] from logits [N, C], both softened by `temperature`.

    The divergence of the softened distributions times the square of the temperature (Hinton et al.,
    Distilling the Knowledge in a Neural Network, 2015). Mean over rows. `pipeline predict` gives a
    teacher's probabilities of the training rows.
    """

    def items(prediction: Tensor, truth: Tensor) -> Tensor:
        least = torch.finfo(truth.dtype).tiny
        teacher = (truth.clamp(min=least).log() / temperature).log_softmax(1)
        student = (prediction / temperature).log_softmax(1)
        both = F.kl_div(student, teacher, reduction="none", log_target=True)
        return both.sum(1) * temperature**2

    def link(prediction: Tensor) -> Tensor:
        return prediction.softmax(1)

    return Loss(items, rows, (Role(kind="logits"),), "distribution", link=link)


@register("ordinal")
def ordinal(*, class_order: Order | None = None) -> Loss:
    """One class of many that have an order, as grades, from one number [N] a row.

    The loss owns the cut points between the classes, in logits (cumulative link;
    McCullagh, Regression Models for Ordinal Data, 1980). Classes of text need their `class_order`,
    the lowest first. Mean over rows.
    """
    ranks: Any = class_order  # numbers by the class's code, once the column is known

    def head(width: int, num_classes: int) -> nn.Module:
        return cut_points(num_classes)

    def log_probabilities(module: Any, prediction: Tensor) -> Tensor:
        """Logarithms of the probabilities of the classes, by rank: [N, C]."""
        below = module() - prediction[:, None]  # logits that the class is no higher, rising
        lowest, highest = F.logsigmoid(below[:, :1]), F.logsigmoid(-below[:, -1:])
        apart = (below[:, :-1] - below[:, 1:]).clamp(
            max=-1e-30
        )  # those that meet have no probability between them
        gap = torch.log(-torch.expm1(apart))
        between = F.logsigmoid(below[:, 1:]) + F.logsigmoid(-below[:, :-1]) + gap
        return torch.cat([lowest, between, highest], dim=1)

    def by_code(columns: Tensor) -> Tensor:
        return columns if ranks is None else columns[:, columns.new_tensor(ranks).long()]

    def items(module: nn.Module, prediction: Tensor, target: Tensor) -> Tensor:
        return F.nll_loss(by_code(log_probabilities(module, prediction)), target, reduction="none")

    def link(module: nn.Module, prediction: Tensor) -> Tensor:
        return by_code(log_probabilities(module, prediction)).exp()

    return Loss(items, rows, (Role(kind="scores"),), "classes", "numbers", link, head=head)


def cut_points(num_classes: int) -> nn.Module:
    """Rising numbers between so many classes [C - 1], as a module: the lowest, then steps above 0.

    At first they are those of equally frequent classes.
    """

    class CutPoints(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            start = (torch.arange(1, num_classes) / num_classes).logit()
            self.lowest = nn.Parameter(start[:1].clone())
            self.steps = nn.Parameter(torch.log(torch.expm1(start.diff())))

        def forward(self) -> Tensor:
            return torch.cat([self.lowest, F.softplus(self.steps)]).cumsum(0)

    return CutPoints()


@register("bce")
def bce(*, class_weight: list[float] | None = None) -> Loss:
    """Yes or no, from probabilities (a sigmoid output). Mean over elements (torch.nn.BCELoss)."""

    def items(prediction: Tensor, target: Tensor) -> Tensor:
        weight = _like(prediction, class_weight)
        return F.binary_cross_entropy(prediction, target, weight=weight, reduction="none")

    role = Role(kind="probabilities", activation="sigmoid")
    return Loss(items, elements, (role,), "binary")


@register("bce_with_logits")
def bce_with_logits(
    *,
    class_weight: list[float] | None = None,
    pos_weight: float | list[float] | Literal["balanced"] | None = None,
    label_smoothing: Smoothing = 0.0,
) -> Loss:
    """Yes or no, or many labels at once, from logits. Mean over elements.

    With `label_smoothing` s, yes counts as 1 - s / 2 and no as s / 2.
    """

    def items(prediction: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(
            prediction,
            target * (1 - label_smoothing) + label_smoothing / 2 if label_smoothing else target,
            weight=_like(prediction, class_weight),
            pos_weight=_like(prediction, pos_weight),
            reduction="none",
        )

    return Loss(items, elements, (Role(kind="logits"),), "binary", link=torch.sigmoid)


@register("multilabel_soft_margin")
def multilabel_soft_margin(*, class_weight: list[float] | None = None) -> Loss:
    """Many labels at once, logits [N, C] against 0/1 [N, C]. Mean over rows."""

    def items(prediction: Tensor, target: Tensor) -> Tensor:
        weight = _like(prediction, class_weight)
        return F.multilabel_soft_margin_loss(prediction, target, weight=weight, reduction="none")

    return Loss(items, rows, (Role(kind="logits"),), "binary", link=torch.sigmoid)


@register("multilabel_margin")
def multilabel_margin() -> Loss:
    """Many labels at once, scores [N, C]; target [N, C] lists class numbers, then -1."""

    def items(prediction: Tensor, target: Tensor) -> Tensor:
        return F.multilabel_margin_loss(prediction, target, reduction="none")

    return Loss(items, rows, (Role(kind="scores"),), "class_lists")


@register("multi_margin")
def multi_margin(
    *, p: Literal[1, 2] = 1, margin: float = 1.0, class_weight: ClassWeight = None
) -> Loss:
    """One class of many by margin, from scores [N, C]. Mean over rows, weights not counted."""

    def items(prediction: Tensor, target: Tensor) -> Tensor:
        weight = per_class(prediction, class_weight)
        return F.multi_margin_loss(
            prediction, target, p=p, margin=margin, weight=weight, reduction="none"
        )

    return Loss(items, rows, (Role(kind="scores", size="classes"),), "classes", "classes")


@register("soft_margin")
def soft_margin() -> Loss:
    """Two classes as -1 and 1, from scores: log(1 + exp(-y x)). Mean over elements."""
    role = Role(kind="scores")
    return Loss(lambda p, t: F.soft_margin_loss(p, t, reduction="none"), elements, (role,), "signs")


@register("kl_div")
def kl_div(*, per: Literal["element", "batch"], log_target: bool = False) -> Loss:
    """Distance of a distribution from log-probabilities. `per: batch` is torch's `batchmean`.

    torch's plain `mean` divides by the number of elements today and will divide by rows in a
    coming release: the spec has to say which one it means.
    """

    def items(prediction: Tensor, target: Tensor) -> Tensor:
        return F.kl_div(prediction, target, reduction="none", log_target=log_target)

    role = Role(kind="log_probabilities", activation="log_softmax")
    kind: Literal["distribution", "log_distribution"] = (
        "log_distribution" if log_target else "distribution"
    )
    return Loss(items, rows if per == "batch" else elements, (role,), kind, link=torch.exp)
