"""The model registry. An entry takes (inputs, outputs) and its options, and is an `nn.Module`.

`inputs` are the fitted columns by name, `outputs` the named outputs the losses read. `forward`
takes a batch, a dict of tensors by column name, and returns a tensor [N, ...] or a dict of them
by output name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field as Option

from pipeline import registry

if TYPE_CHECKING:
    from torch import nn

    from pipeline.data.columns import Field
    from pipeline.losses.bind import Output

    Inputs = dict[str, Field]
    Outputs = dict[str, Output]

register = registry.models.register
Size = Annotated[int, Option(gt=0)]
Rate = Annotated[float, Option(ge=0, lt=1)]


@register("linear")
def linear(inputs: Inputs, outputs: Outputs, *, bias: bool = True) -> nn.Module:
    """One linear layer over all input columns; categories through embeddings."""
    from pipeline.models.mlp import MLP

    return MLP(inputs, outputs, hidden=[], bias=bias)


@register("mlp")
def mlp(
    inputs: Inputs,
    outputs: Outputs,
    *,
    hidden: list[Size] = [64, 64],  # noqa: B006 - read only; the list is what users see
    dropout: Rate = 0.0,
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu",
) -> nn.Module:
    """Layers of `hidden` units over all input columns; categories through embeddings."""
    from pipeline.models.mlp import MLP

    return MLP(inputs, outputs, hidden=hidden, dropout=dropout, activation=activation)


@register("cnn")
def cnn(
    inputs: Inputs,
    outputs: Outputs,
    *,
    channels: list[Size] = [16, 32],  # noqa: B006 - as above
    kernel_size: Size = 3,
    hidden: Size = 64,
    dropout: Rate = 0.0,
) -> nn.Module:
    """Convolutions over one image column [H, W] or [C, H, W], halved after each."""
    from pipeline.models.cnn import CNN

    return CNN(
        inputs, outputs, channels=channels, kernel_size=kernel_size, hidden=hidden, dropout=dropout
    )


@register("transformer")
def transformer(
    inputs: Inputs,
    outputs: Outputs,
    *,
    width: Size = 64,
    num_layers: Size = 2,
    num_heads: Size = 4,
    dropout: Rate = 0.1,
    max_length: Size = 1024,
    per: Literal["token", "row"] = "token",
) -> nn.Module:
    """Attention over a token column: `per: token` is a causal language model, `row` classifies."""
    from pipeline.models.transformer import Transformer

    return Transformer(
        inputs,
        outputs,
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        dropout=dropout,
        max_length=max_length,
        per=per,
    )
