"""`transformer`: attention over one token column, for language models and classifiers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pipeline.data.batch import Batch, Ragged
from pipeline.data.columns import Field, Tokens
from pipeline.errors import UsageError
from pipeline.models.parts import Outputs, only

if TYPE_CHECKING:
    from pipeline.losses.bind import Output


class Block(nn.Module):
    """Attention and feed-forward, each behind a layer norm and beside a residual."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.before_attention = nn.LayerNorm(width)
        self.before_mixing = nn.LayerNorm(width)
        self.attention_in = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mixing = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, hidden: Tensor, allowed: Tensor) -> Tensor:
        rows, length, width = hidden.shape
        parts = self.attention_in(self.before_attention(hidden))
        split = parts.reshape(rows, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=allowed, dropout_p=self.dropout if self.training else 0.0
        )
        hidden = hidden + self.attention_out(mixed.transpose(1, 2).reshape(rows, length, width))
        return hidden + self.mixing(self.before_mixing(hidden))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Tokens [N, L] to outputs per token [N, size, L] (causal) or per row [N, size] (mean)."""

    def __init__(
        self,
        inputs: dict[str, Field],
        outputs: dict[str, Output],
        *,
        width: int,
        num_layers: int,
        num_heads: int,
        dropout: float,
        max_length: int,
        per: str,
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise UsageError(f"transformer: width {width} is not a multiple of {num_heads} heads")
        tokens = only(inputs, Tokens, "token lists")
        self.name = tokens.name
        self.causal = per == "token"
        self.max_length = max_length
        self.embedding = nn.Embedding(tokens.num_codes, width)
        self.position = nn.Embedding(max_length, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, num_heads, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.outputs = Outputs(width, outputs)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        tokens = batch[self.name]
        assert isinstance(tokens, Ragged)
        length = tokens.values.shape[1]
        if length > self.max_length:
            raise UsageError(
                f"column {self.name!r}: a list of {length} tokens, more than "
                f"model.max_length {self.max_length}"
            )
        mask = tokens.mask
        positions = torch.arange(length, device=mask.device)
        allowed = mask[:, None, None, :]
        if self.causal:
            allowed = allowed & (positions <= positions[:, None])
        # a position without anything to look at looks at itself: no softmax over nothing
        allowed = allowed | torch.eye(length, dtype=torch.bool, device=mask.device)
        hidden = self.dropout(self.embedding(tokens.values) + self.position(positions))
        for block in self.blocks:
            hidden = block(hidden, allowed)
        hidden = self.norm(hidden)
        if not self.causal:
            counted = mask.sum(1, keepdim=True).clamp(min=1)
            hidden = (hidden * mask[..., None]).sum(1) / counted
        outputs: dict[str, Tensor] = self.outputs(hidden)
        return outputs
