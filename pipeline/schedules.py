"""Learning-rate schedules: pure functions of the step.

An entry takes progress in [0, 1) after the warm-up and the number of the step after it, then its
options, and returns a factor of the optimizer's learning rate.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import Field

from pipeline import registry

Fraction = Annotated[float, Field(ge=0, le=1)]

register = registry.schedules.register


@register("constant")
def constant(progress: float, step: int) -> float:
    """The same learning rate throughout."""
    return 1.0


@register("cosine")
def cosine(progress: float, step: int, *, final: Fraction = 0.0) -> float:
    """Half a cosine from 1 to `final` over the whole run."""
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


@register("linear")
def linear(progress: float, step: int, *, final: Fraction = 0.0) -> float:
    """A straight line from 1 to `final` over the whole run."""
    return 1 - (1 - final) * progress


@register("step")
def step_decay(
    progress: float, step: int, *, every_steps: Annotated[int, Field(gt=0)], factor: Fraction = 0.1
) -> float:
    """Multiplied by `factor` after every `every_steps` steps."""
    return float(factor ** (step // every_steps))


@register("exponential")
def exponential(
    progress: float, step: int, *, final: Annotated[float, Field(gt=0, le=1)] = 0.01
) -> float:
    """Shrinks by the same factor each step, to `final` at the end."""
    return float(final**progress)


@register("inverse_sqrt")
def inverse_sqrt(
    progress: float, step: int, *, scale_steps: Annotated[int, Field(gt=0)] = 1000
) -> float:
    """1 / sqrt(1 + step / scale_steps): for runs whose length is open."""
    return 1 / math.sqrt(1 + step / scale_steps)


def learning_rate_factor(
    name: str, options: dict[str, Any], warmup_steps: int, step: int, num_steps: int
) -> float:
    """Factor of the learning rate at `step` (from 0) of `num_steps`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    after = step - warmup_steps
    left = max(num_steps - warmup_steps, 1)
    return float(registry.schedules[name].build(after / left, after, **options))
