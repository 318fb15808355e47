"""Commands for Kubernetes: `k8s render`."""

from __future__ import annotations

import click

from pipeline.cli.group import cli
from pipeline.cli.jobs import job_options, parsed
from pipeline.errors import UsageError


@cli.group()
def k8s() -> None:
    """Train jobs on Kubernetes, with KubeRay; k8s/README.md tells how to set a cluster up."""


@k8s.command("render")
@job_options
@click.option(
    "--platform",
    "place",
    required=True,
    metavar="PATH",
    help="An overlay, as k8s/overlays/local, or a file with the ConfigMap `platform`.",
)
@click.option(
    "--timeout",
    metavar="TIME",
    help="End an attempt after so long, as 12h or 90m; its state is saved. Unless given, "
    "training.time_limit and an hour more, or a day.",
)
@click.option(
    "--retries",
    type=click.IntRange(0),
    default=2,
    show_default=True,
    help="New Ray clusters after one that failed; each resumes.",
)
@click.option("--fresh", is_flag=True, help="Start a new run, whatever there is of this job.")
def render_run(
    job: str,
    overrides: tuple[str, ...],
    imports: tuple[str, ...],
    as_json: bool,
    place: str,
    timeout: str | None,
    retries: int,
    fresh: bool,
) -> None:
    """Print the manifests that train a job: `kubectl apply -f -` starts it.

    Workers, GPUs, memory and deadlines are those of the spec; images, volumes and node labels those
    of the platform. The name follows from what is trained, so that the same job is not started
    twice. No cluster is asked.
    """
    import json
    import re

    from pipeline.kubernetes.manifests import manifests
    from pipeline.kubernetes.platform import read
    from pipeline.kubernetes.render import prepare, rendered

    if timeout and not re.fullmatch(r"\d+(\.\d+)?[smh]", timeout):
        raise UsageError(f"--timeout {timeout}: expected a time, as 30s, 90m or 2h")
    run = prepare(
        job, overrides, parsed(overrides), imports, read(place),
        timeout=timeout, retries=retries, fresh=fresh, source=_source(),
    )  # fmt: skip
    text = rendered(run)
    if as_json:
        text = json.dumps({"apiVersion": "v1", "kind": "List", "items": manifests(run)}) + "\n"
    click.echo(text, nl=False)


def _source() -> dict[str, str]:
    """Who renders a run, from which commit; without what is not committed, which may be long."""
    from pipeline.tracking.source import source_tags

    return {key: value for key, value in source_tags().items() if not key.endswith(".diff")}
