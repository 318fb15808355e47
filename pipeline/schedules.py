"""Learning-rate schedules: pure functions of the step, and one that follows evaluations.

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


@register("polynomial")
def polynomial(
    progress: float,
    step: int,
    *,
    power: Annotated[float, Field(gt=0)] = 1.0,
    final: Fraction = 0.0,
) -> float:
    """From 1 to `final` as (1 - progress) ** power falls to 0; 1 is a straight line."""
    return float(final + (1 - final) * (1 - progress) ** power)


@register("multistep")
def multistep(
    progress: float,
    step: int,
    *,
    steps: Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=1)],
    factor: Fraction = 0.1,
) -> float:
    """Multiplied by `factor` after each of these numbers of steps."""
    return float(factor ** sum(step >= milestone for milestone in steps))


@register("cosine_restarts")
def cosine_restarts(
    progress: float,
    step: int,
    *,
    cycle_steps: Annotated[int, Field(gt=0)],
    growth: Annotated[int, Field(ge=1)] = 1,
    final: Fraction = 0.0,
) -> float:
    """Half a cosine over `cycle_steps` steps, again and again, each cycle `growth` times as long.

    SGDR: Loshchilov and Hutter, 2017.
    """
    length = cycle_steps
    if growth == 1:  # a long run has too many cycles to count them through
        step %= length
    while step >= length:
        step -= length
        length *= growth
    return float(cosine(step / length, step, final=final))


@register("one_cycle")
def one_cycle(
    progress: float,
    step: int,
    *,
    rise: Annotated[float, Field(gt=0, lt=1)] = 0.3,
    start: Fraction = 0.04,
    final: Fraction = 4e-6,
) -> float:
    """Half a cosine from `start` up to 1 in the first part of the run, and one down to `final`.

    `rise` is that part. Smith and Topin, 2018; the momentum stays as it is.
    """
    if step == 0:
        return start
    num_steps = round(step / progress)
    top = rise * num_steps - 1
    if step <= top:
        return float(cosine(1 - step / top, step, final=start))
    return float(cosine((step - top) / (num_steps - 1 - top), step, final=final))


@register("reduce_on_plateau")
def reduce_on_plateau(
    progress: float,
    step: int,
    *,
    metric: str = "loss",
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1,
    patience: Annotated[int, Field(ge=1)] = 5,
    min_delta: Annotated[float, Field(ge=0)] = 0.0,
    cooldown: Annotated[int, Field(ge=0)] = 0,
    final: Fraction = 0.0,
) -> float:
    """Multiplied by `factor` each time that `patience` evaluations in a row were no better.

    By `metric`, a loss or metric of the validation rows, and by more than `min_delta`; `cooldown`
    evaluations after it do not count; never below `final`.
    """
    return 1.0  # what the evaluations make of it is kept with the training's state


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
