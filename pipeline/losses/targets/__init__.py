"""The kinds of targets: how a loss reads its target columns, and what its predictions mean.

A kind is one class. `Loss.target` names it; everything that differs between kinds is asked of it:
how a column is read and checked, which metrics it has, and what a prediction is served as.
"""

from pipeline.losses.targets.amounts import AnyTarget, Counts, Quantiles, Values, unscaled
from pipeline.losses.targets.base import Items, Target
from pipeline.losses.targets.binary import Binary, Signs
from pipeline.losses.targets.classes import Classes, Groups
from pipeline.losses.targets.distributions import Distribution, LogDistribution
from pipeline.losses.targets.lists import ClassLists, NoTarget, Tokens
from pipeline.losses.targets.survival import Survival

__all__ = [
    "TARGETS",
    "Binary",
    "Classes",
    "Items",
    "NoTarget",
    "Signs",
    "Target",
    "Values",
    "unscaled",
]

KINDS: list[Target] = [
    Values(),
    Counts(),
    Quantiles(),
    Survival(),
    Classes(),
    Groups(),
    Binary(),
    Signs(),
    Distribution(),
    LogDistribution(),
    ClassLists(),
    Tokens(),
    NoTarget(),
    AnyTarget(),
]
TARGETS: dict[str, Target] = {kind.name: kind for kind in KINDS}
"""The kinds by the name that a `Loss` gives."""
