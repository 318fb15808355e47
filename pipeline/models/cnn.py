"""`cnn`: a small convolutional network over one image column."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from pipeline.data.batch import Batch, Ragged
from pipeline.data.columns import Field, FixedTensor, Image
from pipeline.errors import UsageError
from pipeline.models.parts import Outputs, only

if TYPE_CHECKING:
    from pipeline.losses.bind import Output


class CNN(nn.Module):
    """Convolution, ReLU and 2 x 2 pooling per entry of `channels`, then one hidden layer.

    No batch normalisation: its statistics would depend on the micro-batch.
    """

    def __init__(
        self,
        inputs: dict[str, Field],
        outputs: dict[str, Output],
        *,
        channels: list[int],
        kernel_size: int,
        hidden: int,
        dropout: float,
    ) -> None:
        super().__init__()
        image = only(inputs, FixedTensor | Image, "images (data.images, or fixed-size lists)")
        self.name = image.name
        shape = (1, *image.shape) if len(image.shape) == 2 else image.shape
        if len(shape) != 3 or min(shape[1:]) >> len(channels) == 0:
            raise UsageError(
                f"cnn: column {image.name!r} has rows of shape {list(image.shape)}; expected "
                f"[H, W] or [C, H, W] of at least {2 ** len(channels)} pixels a side "
                f"for {len(channels)} halvings"
            )
        self.shape = shape
        layers: list[nn.Module] = []
        depth, height, width = shape
        for size in channels:
            layers += [nn.Conv2d(depth, size, kernel_size, padding="same"), nn.ReLU()]
            layers += [nn.MaxPool2d(2)]
            depth = size
            height = height // 2
            width = width // 2
        self.layers = nn.Sequential(
            *layers,
            nn.Flatten(),
            nn.Linear(depth * height * width, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
        )
        self.outputs = Outputs(hidden, outputs)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        image = batch[self.name]
        assert not isinstance(image, Ragged)
        outputs: dict[str, Tensor] = self.outputs(self.layers(image.reshape(-1, *self.shape)))
        return outputs
