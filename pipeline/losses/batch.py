"""Losses that couple the rows of a batch: each is computed once for the whole global batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from pipeline.losses.contract import Loss, Role, register, rows
from pipeline.losses.ranking import EMBEDDING_SIZE, VECTORS
from pipeline.registry import lazy

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
else:
    torch = lazy("torch")
    F = lazy("torch.nn.functional")

Positive = Annotated[float, Field(gt=0)]
SMALLEST = 1e-30
"""Below this a root's gradient would be infinite; it is taken as 0."""


@register("info_nce")
def info_nce(*, temperature: Positive = 0.07, symmetric: bool = True) -> Loss:
    """Vectors `first` and `second` [N, D] of one row alike, those of different rows unlike.

    Cross-entropy of each row's partner among all rows of the global batch, by cosine over
    `temperature` (van den Oord et al., 2018); `symmetric`, also the other way round (CLIP, Radford
    et al., 2021).
    """

    def items(first: Tensor, second: Tensor) -> Tensor:
        logits = F.normalize(first, dim=1) @ F.normalize(second, dim=1).T / temperature
        partner = torch.arange(len(logits), device=logits.device)
        loss = F.cross_entropy(logits, partner)
        return (loss + F.cross_entropy(logits.T, partner)) / 2 if symmetric else loss

    return Loss(items, rows, VECTORS, "none", "rows", F.cosine_similarity, per_batch=True)


@register("triplet_batch_hard")
def triplet_batch_hard(*, margin: Positive | Literal["soft"] = "soft") -> Loss:
    """Vectors [N, D] of one class nearer to each other than to any other class by `margin`.

    For each row its farthest row of the same class and its nearest of another one, in the global
    batch; rows without both are skipped (Hermans, Beyer, Leibe, 2017). The margin `soft` takes
    log(1 + exp(x)) for max(0, x + margin).
    """

    def items(embedding: Tensor, label: Tensor) -> Tensor:
        difference = embedding[:, None] - embedding[None, :]
        distance = difference.square().sum(2).clamp(min=SMALLEST).sqrt()
        same = label[:, None] == label[None, :]
        other_row = ~torch.eye(len(label), dtype=torch.bool, device=label.device)
        farthest = distance.masked_fill(~(same & other_row), -torch.inf).amax(1)
        nearest = distance.masked_fill(same, torch.inf).amin(1)
        counted = torch.isfinite(farthest) & torch.isfinite(nearest)
        if not bool(counted.any()):
            return embedding.sum() * 0
        excess = (farthest - nearest)[counted]
        return F.softplus(excess).mean() if margin == "soft" else (excess + margin).relu().mean()

    role = Role("embedding", "embeddings", EMBEDDING_SIZE)
    return Loss(items, rows, (role,), "groups", "rows", per_batch=True)


@register("supervised_contrastive")
def supervised_contrastive(*, temperature: Positive = 0.1) -> Loss:
    """Vectors [N, D] of one class alike, those of different classes unlike.

    For each row the mean over the other rows of its class of -log of their share among all rows of
    the global batch, by cosine over `temperature` (Khosla et al., Supervised Contrastive Learning,
    2020); the mean over the rows that have such.
    """

    def items(embedding: Tensor, label: Tensor) -> Tensor:
        unit = F.normalize(embedding, dim=1)
        own_row = torch.eye(len(label), dtype=torch.bool, device=label.device)
        logits = (unit @ unit.T / temperature).masked_fill(own_row, -torch.inf)
        same = (label[:, None] == label[None, :]) & ~own_row
        num_same = same.sum(1)
        if not bool(num_same.any()):
            return embedding.sum() * 0
        logarithms = logits - logits.logsumexp(1, keepdim=True)
        losses = -logarithms.masked_fill(~same, 0.0).sum(1) / num_same.clamp(min=1)
        return losses[num_same > 0].mean()

    role = Role("embedding", "embeddings", EMBEDDING_SIZE)
    return Loss(items, rows, (role,), "groups", "rows", per_batch=True)


@register("rmse")
def rmse() -> Loss:
    """Root of the mean squared error of the global batch, in the target's unit."""

    def items(prediction: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(prediction, target).clamp(min=SMALLEST).sqrt()

    return Loss(items, rows, per_batch=True)


@register("dice")
def dice(*, smooth: Positive = 1.0) -> Loss:
    """1 less the overlap of yes-predictions and yes-targets, from logits: rare classes, masks.

    1 - (2 sum(p t) + smooth) / (sum(p) + sum(t) + smooth) over all elements of the global batch
    (Milletari et al., 2016, without squares).
    """

    def items(prediction: Tensor, target: Tensor) -> Tensor:
        probability = prediction.sigmoid()
        overlap = (probability * target).sum()
        both = probability.sum() + target.sum()
        return 1 - (2 * overlap + smooth) / (both + smooth)

    link = torch.sigmoid
    return Loss(items, rows, (Role(kind="logits"),), "binary", link=link, per_batch=True)
