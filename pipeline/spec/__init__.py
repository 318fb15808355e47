"""The job spec: what is trained (first half) and how it is carried out (second half).

Nothing here imports torch.
"""

from pipeline.spec.components import Choice, Term
from pipeline.spec.job import FIRST_HALF, OUTSIDE_DIGEST, JobSpec, flat, schema
from pipeline.spec.loader import load, parse_override
from pipeline.spec.sections import Cache, Checkpoint

__all__ = [
    "FIRST_HALF",
    "OUTSIDE_DIGEST",
    "Cache",
    "Checkpoint",
    "Choice",
    "JobSpec",
    "Term",
    "flat",
    "load",
    "parse_override",
    "schema",
]
