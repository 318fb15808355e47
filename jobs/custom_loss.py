"""The loss of `custom_loss.yaml`."""

from torch import Tensor, maximum

import pipeline


@pipeline.losses.register("quantile")
def quantile(prediction: Tensor, target: Tensor, *, level: float = 0.5) -> Tensor:
    """Pinball loss: its least value is at the target's `level` quantile (Koenker, 1978)."""
    error = target - prediction
    return maximum(level * error, (level - 1) * error)
