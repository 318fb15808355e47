"""The loss registry: torch's losses, custom ones, and weighted sums of them.

`contract` says what a loss is; one file per family holds the entries; `terms` binds the losses a
job spec names to a model's outputs and the data's targets; `checks` tries whether these fit.
"""

from pipeline.losses import (
    batch,
    classification,
    counts,
    ranking,
    rare,
    regression,
    sequence,
    survival,
)
from pipeline.losses.contract import Loss, Role, build, elements, per_item, register, rows

__all__ = [
    "Loss",
    "Role",
    "batch",
    "build",
    "classification",
    "counts",
    "elements",
    "per_item",
    "ranking",
    "rare",
    "register",
    "regression",
    "rows",
    "sequence",
    "survival",
]
