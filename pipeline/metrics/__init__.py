"""The metric registry: what validation rows are judged by, exact over any number of workers.

`contract` says what a metric is; one file per task holds the entries.
"""

from pipeline.metrics import classification, ranking, regression
from pipeline.metrics.contract import Metric, Reads, Task, register

__all__ = [
    "Metric",
    "Reads",
    "Task",
    "classification",
    "ranking",
    "register",
    "regression",
]
