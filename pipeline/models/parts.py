"""What models share: columns to one feature vector, features to named outputs."""

from __future__ import annotations

import math
from types import UnionType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pipeline.data.batch import Batch, Ragged, side_by_side
from pipeline.data.columns import UNKNOWN, Category, Field, Series, Tokens
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from pipeline.losses.bind import Output


class Features(nn.Module):
    """All input columns side by side: numbers, flattened tensors and embedded categories.

    A batch in, float [N, width] out.
    """

    def __init__(self, inputs: dict[str, Field]) -> None:
        super().__init__()
        self.width = 0
        embeddings: dict[str, nn.Module] = {}
        self.runs: list[tuple[str | None, list[str]]] = []  # numbers that follow each other
        for index, (name, field) in enumerate(inputs.items()):
            if isinstance(field, Tokens | Series):
                raise UsageError(
                    f"data.inputs: column {name!r} holds lists of different lengths, which this "
                    "model cannot read: use `transformer` (tokens), or lists of one fixed size"
                )
            if isinstance(field, Category):
                size = min(32, math.ceil(field.num_codes**0.5) + 1)
                # no training row has the unknown category: 0 rather than noise
                embeddings[str(index)] = nn.Embedding(field.num_codes, size, padding_idx=UNKNOWN)
                self.runs.append((str(index), [name]))
            else:
                size = math.prod(field.shape)
                if self.runs and self.runs[-1][0] is None:
                    self.runs[-1][1].append(name)
                else:
                    self.runs.append((None, [name]))
            self.width += size
        self.embeddings = nn.ModuleDict(embeddings)

    def forward(self, batch: Batch) -> Tensor:
        parts = []
        for key, names in self.runs:
            if key is None:
                parts.append(side_by_side(batch, tuple(names)))
                continue
            codes = batch[names[0]]
            assert not isinstance(codes, Ragged)
            parts.append(self.embeddings[key](codes))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class Outputs(nn.Module):
    """One linear layer and activation per named output.

    Features [N, width] (or [N, L, width]) in; per output [N], [N, size] (or [N, size, L]) out.
    """

    def __init__(self, width: int, outputs: dict[str, Output], bias: bool = True) -> None:
        super().__init__()
        self.outputs = list(outputs.values())
        self.layers = nn.ModuleList(
            nn.Linear(width, output.size or 1, bias=bias) for output in self.outputs
        )

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        predictions = {}
        for output, layer in zip(self.outputs, self.layers, strict=True):
            raw: Tensor = layer(features)
            if raw.dim() == 3:
                raw = raw.transpose(1, 2)  # classes stand in dimension 1, as torch's losses expect
            predictions[output.name] = activate(
                raw if output.size else raw.squeeze(1), output.activation
            )
        return predictions


def activate(raw: Tensor, activation: str) -> Tensor:
    """The activation by name, over dimension 1 where it has one; in full precision."""
    raw = raw.float() if raw.dtype in (torch.bfloat16, torch.float16) else raw
    if activation == "identity":
        return raw
    if activation == "softmax":
        return raw.softmax(1)
    if activation == "log_softmax":
        return raw.log_softmax(1)
    if activation == "normalize":
        return nn.functional.normalize(raw, dim=1)
    if activation == "softplus":
        return nn.functional.softplus(raw)
    pointwise = {"sigmoid": torch.sigmoid, "exp": torch.exp, "tanh": torch.tanh}
    return pointwise[activation](raw)


def only(inputs: dict[str, Field], kinds: type[Field] | UnionType, what: str) -> Field:
    """The one input of these kinds; UsageError when there is none, or another beside it."""
    fitting = [field for field in inputs.values() if isinstance(field, kinds)]
    if len(fitting) != 1 or len(inputs) != 1:
        named = ", ".join(f"{field.name} ({field.kind})" for field in inputs.values())
        raise UsageError(
            f"model reads one input column of {what}; data.inputs gives: {named}; name that one in "
            "data.inputs, or write a model of your own that reads all of them"
        )
    return fitting[0]
