"""`linear` and `mlp`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from pipeline.data.batch import Batch
from pipeline.data.columns import Field
from pipeline.models.parts import Features, Outputs

if TYPE_CHECKING:
    from pipeline.losses.bind import Output

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}


class MLP(nn.Module):
    """Fully connected layers; with no `hidden` layer, a linear model."""

    def __init__(
        self,
        inputs: dict[str, Field],
        outputs: dict[str, Output],
        *,
        hidden: list[int],
        dropout: float = 0.0,
        activation: str = "relu",
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.features = Features(inputs)
        layers: list[nn.Module] = []
        width = self.features.width
        for size in hidden:
            layers += [
                nn.Linear(width, size),
                ACTIVATIONS[activation](),
                nn.Dropout(dropout) if dropout else nn.Identity(),
            ]
            width = size
        self.layers = nn.Sequential(*layers)
        self.outputs = Outputs(width, outputs, bias)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = self.outputs(self.layers(self.features(batch)))
        return outputs
