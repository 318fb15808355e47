"""Distributed training whose loss curve belongs to the job spec, not to the cluster.

import pipeline
result = pipeline.run("jobs/diabetes.yaml", overrides={"training.epochs": 5})
result.metrics, result.losses, result.model
"""

from importlib.metadata import PackageNotFoundError, version

# modules, each with `register`: a registry under such a name would be replaced by the module
from pipeline import losses, metrics, models, optimizers, schedules
from pipeline.launch.folds import run_folds
from pipeline.launch.result import Result
from pipeline.launch.run import check, run
from pipeline.spec import JobSpec, load

try:
    __version__ = version("pipeline")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0"

__all__ = [
    "JobSpec",
    "Result",
    "__version__",
    "check",
    "load",
    "losses",
    "metrics",
    "models",
    "optimizers",
    "run",
    "run_folds",
    "schedules",
]
