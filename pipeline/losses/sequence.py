"""Losses of sequences without alignment: `ctc`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from pipeline.losses.contract import Loss, Role, register, rows
from pipeline.registry import lazy

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from pipeline.data.batch import Ragged
else:
    torch = lazy("torch")
    F = lazy("torch.nn.functional")


@register("ctc")
def ctc(*, blank: Annotated[int, Field(ge=0)] = 0, zero_infinity: bool = False) -> Loss:
    """Unaligned sequences: log-probabilities [N, C, T] against token lists. Mean over rows.

    Each row's loss is divided by its target's length (at least 1) before the mean, as
    torch.nn.CTCLoss does. A second target column, if the term names one, holds the number of
    valid positions of each row's prediction; without it all T count.
    """

    def items(prediction: Tensor, target: Ragged, lengths: Tensor | None = None) -> Tensor:
        num_rows, _, num_positions = prediction.shape
        if num_rows == 0:
            return prediction.sum((1, 2))
        valid = torch.full((num_rows,), num_positions) if lengths is None else lengths.long()
        losses = F.ctc_loss(
            prediction.permute(2, 0, 1),
            target.values,
            valid,
            target.lengths,
            blank=blank,
            reduction="none",
            zero_infinity=zero_infinity,
        )
        return losses / target.lengths.clamp(min=1)

    role = Role(kind="log_probabilities", size="classes", activation="log_softmax")
    return Loss(items, rows, (role,), "tokens", "any", torch.exp, blank=blank)
