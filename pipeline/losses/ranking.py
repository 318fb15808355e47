"""Losses of embeddings and ranks: predictions are compared with each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from pipeline.losses.contract import Loss, Role, elements, register, rows
from pipeline.registry import lazy

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
else:
    torch = lazy("torch")
    F = lazy("torch.nn.functional")

Positive = Annotated[float, Field(gt=0)]
EMBEDDING_SIZE = 32
PAIR = (Role("first", "scores"), Role("second", "scores"))
VECTORS = (
    Role("first", "embeddings", EMBEDDING_SIZE),
    Role("second", "embeddings", EMBEDDING_SIZE),
)
TRIPLET = tuple(Role(n, "embeddings", EMBEDDING_SIZE) for n in ("anchor", "positive", "negative"))


@register("hinge_embedding")
def hinge_embedding(*, margin: float = 1.0) -> Loss:
    """Distances made small where the target is 1, at least `margin` where it is -1."""

    def items(prediction: Tensor, target: Tensor) -> Tensor:
        return F.hinge_embedding_loss(prediction, target, margin=margin, reduction="none")

    def link(distance: Tensor) -> Tensor:
        return margin / 2 - distance  # above 0 where the loss for 1 is less than that for -1

    role = Role(kind="rates", activation="softplus")
    return Loss(items, elements, (role,), "signs", link=link)


@register("cosine_embedding")
def cosine_embedding(*, margin: Annotated[float, Field(ge=-1, le=1)] = 0.0) -> Loss:
    """Vectors `first` and `second` [N, D] alike where the target is 1, unlike where it is -1."""

    def items(first: Tensor, second: Tensor, target: Tensor) -> Tensor:
        return F.cosine_embedding_loss(first, second, target, margin=margin, reduction="none")

    return Loss(items, rows, VECTORS, "signs", "rows", F.cosine_similarity)


@register("margin_ranking")
def margin_ranking(*, margin: float = 0.0) -> Loss:
    """Score `first` above `second` where the target is 1, below where it is -1."""

    def items(first: Tensor, second: Tensor, target: Tensor) -> Tensor:
        return F.margin_ranking_loss(first, second, target, margin=margin, reduction="none")

    return Loss(items, elements, PAIR, "signs", link=torch.sub)


@register("triplet_margin")
def triplet_margin(
    *, margin: Positive = 1.0, p: Positive = 2.0, eps: Positive = 1e-6, swap: bool = False
) -> Loss:
    """`anchor` nearer to `positive` than to `negative` by `margin`; vectors [N, D], no target."""

    def items(anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        return F.triplet_margin_loss(
            anchor, positive, negative, margin=margin, p=p, eps=eps, swap=swap, reduction="none"
        )

    return Loss(items, rows, TRIPLET, "none", "rows", lambda anchor, *_: anchor)


@register("triplet_margin_with_distance")
def triplet_margin_with_distance(
    *,
    distance: Literal["euclidean", "cosine", "manhattan"] = "euclidean",
    margin: Positive = 1.0,
    swap: bool = False,
) -> Loss:
    """`triplet_margin` with another distance; others by registering a custom loss."""

    def between(first: Tensor, second: Tensor) -> Tensor:
        if distance == "cosine":
            return 1 - F.cosine_similarity(first, second)
        return F.pairwise_distance(first, second, p=1.0 if distance == "manhattan" else 2.0)

    def items(anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        return F.triplet_margin_with_distance_loss(
            anchor,
            positive,
            negative,
            distance_function=between,
            margin=margin,
            swap=swap,
            reduction="none",
        )

    return Loss(items, rows, TRIPLET, "none", "rows", lambda anchor, *_: anchor)
