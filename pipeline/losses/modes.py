"""Training and evaluation of a module, in which each submodule keeps a setting of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The module in evaluation; afterwards every submodule is as it was.

    A constructor may leave some of them in evaluation for good, as a frozen BatchNorm:
    `module.train()` would thaw them.
    """
    before = [(submodule, submodule.training) for submodule in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for submodule, was_training in before:
            submodule.training = was_training
