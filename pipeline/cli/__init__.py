"""The commands. Each imports what it needs when it runs, so that `--help` answers at once."""

from pipeline.cli import cache, cluster, components, jobs, kubernetes, models, runs
from pipeline.cli.group import cli, main

__all__ = ["cache", "cli", "cluster", "components", "jobs", "kubernetes", "main", "models", "runs"]
