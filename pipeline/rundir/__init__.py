"""A run's folder: its files, who may write them, and how they are read after a crash."""

from pipeline.rundir.layout import RunDir

__all__ = ["RunDir"]
