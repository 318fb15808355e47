"""Losses of rare classes, which count what is easy to tell less: `focal`, `asymmetric`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from pipeline.losses.classification import ClassWeight, counted, per_class
from pipeline.losses.contract import Loss, Role, elements, register
from pipeline.registry import lazy

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
else:
    torch = lazy("torch")
    F = lazy("torch.nn.functional")

Focus = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


def _power(base: Tensor, exponent: float) -> Tensor:
    """The base, from 0 to 1, to a power; its gradient is finite at 0 too."""
    return base.clamp(min=torch.finfo(base.dtype).tiny) ** exponent


@register("focal")
def focal(
    *, gamma: Focus = 2.0, class_weight: ClassWeight = None, ignore_index: int = -100
) -> Loss:
    """Cross-entropy times (1 - probability of the true class)^gamma, from logits [N, C, ...].

    Lin et al., Focal Loss for Dense Object Detection, 2017. Mean over the weights of counted items,
    so that it is `cross_entropy` for `gamma` 0.
    """

    def items(prediction: Tensor, target: Tensor) -> Tensor:
        logarithms = prediction.log_softmax(1)
        plain = F.nll_loss(logarithms, target, ignore_index=ignore_index, reduction="none")
        weight = per_class(prediction, class_weight)
        weighted = plain
        if weight is not None:
            weighted = F.nll_loss(
                logarithms, target, weight=weight, ignore_index=ignore_index, reduction="none"
            )
        return _power(-torch.expm1(-plain), gamma) * weighted

    def link(prediction: Tensor) -> Tensor:
        return prediction.softmax(1)

    role = Role(kind="logits", size="classes")
    denominator = counted(class_weight, ignore_index)
    return Loss(items, denominator, (role,), "classes", "classes", link, ignore_index)


@register("binary_focal")
def binary_focal(*, gamma: Focus = 2.0, alpha: Share | None = 0.25) -> Loss:
    """Focal loss for yes or no, or many labels at once; `alpha` weighs yes, 1 - `alpha` no.

    Lin et al., 2017, as torchvision.ops.sigmoid_focal_loss. Mean over elements.
    """

    def items(prediction: Tensor, target: Tensor) -> Tensor:
        plain = F.binary_cross_entropy_with_logits(prediction, target, reduction="none")
        missed = prediction.sigmoid() * (1 - target) + (-prediction).sigmoid() * target
        weight = 1.0 if alpha is None else alpha * target + (1 - alpha) * (1 - target)
        return weight * _power(missed, gamma) * plain

    return Loss(items, elements, (Role(kind="logits"),), "binary", link=torch.sigmoid)


@register("asymmetric")
def asymmetric(*, gamma_yes: Focus = 0.0, gamma_no: Focus = 4.0, margin: Share = 0.05) -> Loss:
    """Focal loss with another exponent for yes and for no, whose probability below `margin` is 0.

    Ridnik et al., Asymmetric Loss for Multi-Label Classification, 2021. Mean over elements.
    """

    def items(prediction: Tensor, target: Tensor) -> Tensor:
        of_yes = _power((-prediction).sigmoid(), gamma_yes) * F.logsigmoid(prediction)
        shifted = (prediction.sigmoid() - margin).clamp(min=0)
        is_no = torch.log1p(-shifted) if margin else F.logsigmoid(-prediction)
        of_no = _power(shifted, gamma_no) * is_no
        return -(target * of_yes + (1 - target) * of_no)

    return Loss(items, elements, (Role(kind="logits"),), "binary", link=torch.sigmoid)
