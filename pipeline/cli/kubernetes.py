"""Commands for Kubernetes: `k8s render`, `submit`, `status`, `logs`, `stop` and `doctor`."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from pipeline import render
from pipeline.cli.cluster import confirm, line_printer
from pipeline.cli.group import cli
from pipeline.cli.jobs import job_options, parsed
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from pipeline.kubernetes.client import Kubernetes, RunState
    from pipeline.kubernetes.platform import Platform
    from pipeline.kubernetes.run import Run

Command = Callable[..., None]
NAMESPACE = "pipeline"
"""Of the platform and its runs."""


@cli.group()
def k8s() -> None:
    """Train jobs on Kubernetes, with KubeRay; k8s/README.md tells how to set a cluster up."""


def _run_options(command: Command) -> Command:
    for add in (
        click.option(
            "--timeout",
            metavar="TIME",
            help="End an attempt after so long, as 12h or 90m; its state is saved. Unless given, "
            "training.time_limit and an hour more, or a day.",
        ),
        click.option(
            "--retries",
            type=click.IntRange(0),
            default=2,
            show_default=True,
            help="New Ray clusters after one that failed; each resumes. None with --fresh.",
        ),
        click.option(
            "--fresh", is_flag=True, help="Start a new run, whatever there is of this job."
        ),
    ):
        command = add(command)
    return job_options(command)


def _name(command: Command) -> Command:
    return click.argument("name", metavar="JOB")(command)


@k8s.command("render")
@_run_options
@click.option(
    "--platform",
    "place",
    required=True,
    metavar="PATH",
    help="An overlay, as k8s/overlays/local, or a file with the ConfigMap `platform`.",
)
def render_run(
    job: str,
    overrides: tuple[str, ...],
    imports: tuple[str, ...],
    as_json: bool,
    timeout: str | None,
    retries: int,
    fresh: bool,
    place: str,
) -> None:
    """Print the manifests that train a job: `kubectl apply -f -` starts it.

    Workers, GPUs, memory and deadlines are those of the spec; images, volumes and node labels those
    of the platform. The name follows from what is trained, so that the same job is not started
    twice. No cluster is asked.
    """
    from pipeline.kubernetes.manifests import manifests
    from pipeline.kubernetes.platform import read
    from pipeline.kubernetes.render import rendered

    run = _prepared(job, overrides, imports, read(place), timeout, retries, fresh)
    text = rendered(run)
    if as_json:
        text = json.dumps({"apiVersion": "v1", "kind": "List", "items": manifests(run)}) + "\n"
    click.echo(text, nl=False)


def _prepared(
    job: str,
    overrides: tuple[str, ...],
    imports: tuple[str, ...],
    platform: Platform,
    timeout: str | None,
    retries: int,
    fresh: bool,
) -> Run:
    from pipeline.kubernetes.render import prepare
    from pipeline.tracking.source import source_tags

    if timeout and not re.fullmatch(r"\d+(\.\d+)?[smh]", timeout):
        raise UsageError(f"--timeout {timeout}: expected a time, as 30s, 90m or 2h")
    # without what is not committed, which may be long
    source = {key: value for key, value in source_tags().items() if not key.endswith(".diff")}
    return prepare(
        job, overrides, parsed(overrides), imports, platform,
        timeout=timeout, retries=retries, fresh=fresh, source=source,
    )  # fmt: skip


@k8s.command()
@_run_options
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@click.option("--detach", is_flag=True, help="Do not follow it.")
def submit(
    job: str,
    overrides: tuple[str, ...],
    imports: tuple[str, ...],
    as_json: bool,
    timeout: str | None,
    retries: int,
    fresh: bool,
    yes: bool,
    detach: bool,
) -> None:
    """Train a job on Kubernetes, and follow it.

    The cluster is that of kubectl's context. What would happen is shown before it is asked for; the
    manifests are those of `render`, with the settings of the cluster's platform.

    The same command again attaches to the run while it is there, resumes it if it was stopped or
    has failed, and shows what became of one that is finished. Ctrl-C leaves it running. Exit codes
    are those of `run`.
    """
    from pipeline.cluster.plan import check_here
    from pipeline.kubernetes.client import Kubernetes
    from pipeline.kubernetes.render import rendered
    from pipeline.kubernetes.submit import make_plan, send

    cluster = Kubernetes(NAMESPACE)
    platform = cluster.platform()
    run = _prepared(job, overrides, imports, platform, timeout, retries, fresh)
    rendered(run)  # refuses what would not run
    plan = make_plan(
        cluster, run, lambda: check_here(job, parsed(overrides), imports, run.package)[0]
    )
    for line in render.run_plan_lines(plan):
        click.echo(line, err=True)
    if plan.action in ("start", "resume"):
        confirm(yes)
        is_ours = send(plan, platform.grace_seconds)
        said = "submitted" if is_ours else "was submitted by another command at the same time"
        click.echo(f"run   {run.name} {said}", err=True)
    if detach:
        _tell_next(run.name)
        if as_json:
            words = {"attach": "running", "tell": "finished"}
            state = words.get(plan.action, "submitted")
            click.echo(json.dumps({"state": state, "name": run.name}))
        return
    _follow(cluster, run.name, as_json)


def _follow(cluster: Kubernetes, name: str, as_json: bool) -> None:
    """Show a run to its end, and end with its exit code; Ctrl-C leaves it."""
    from pipeline.cluster.follow import Lines
    from pipeline.kubernetes.submit import explain, follow

    state = cluster.run(name)
    show = line_printer(is_over=state is not None and state.is_over)
    lines = Lines(show, hides_result=True)
    try:
        ended = follow(cluster, name, lines, lambda text: show(text, False))
    except KeyboardInterrupt:
        click.echo("\ndetached: the run goes on", err=True)
        _tell_next(name)
        if as_json:
            click.echo(json.dumps({"state": "detached", "name": name}))
        return
    _finish(ended, lines.result, explain(ended), as_json)


def _finish(ended: RunState, result: dict[str, object] | None, why: str, as_json: bool) -> None:
    if why:
        click.echo(f"error: {ended.name}: {why}", err=True)
    if as_json:
        said = {"state": "finished" if ended.succeeded else "failed"} if result is None else result
        click.echo(json.dumps({**said, "name": ended.name}))
    sys.exit(ended.exit_code)


def _tell_next(name: str) -> None:
    for command, what in (
        (f"pipeline k8s logs {name} --follow", "follow it"),
        (f"pipeline k8s status {name}", "what it is at"),
        (f"pipeline k8s stop {name}", "save its state and end it"),
    ):
        click.echo(f"      {command:60}  {what}", err=True)


@k8s.command()
@click.argument("name", metavar="[JOB]", required=False)
@click.option("--json", "as_json", is_flag=True, help="A JSON object a line for each run.")
def status(name: str | None, as_json: bool) -> None:
    """Show the runs in a namespace: all, or those of one job.

    JOB is a job's name, or that of a RayJob.
    """
    from pipeline.kubernetes.client import Kubernetes

    found = Kubernetes(NAMESPACE).runs(name)
    if name and not found:
        raise UsageError(f"{name}: no run of that name is there")
    lines = [json.dumps(one.to_json()) for one in found] if as_json else render.run_lines(found)
    for line in lines:
        click.echo(line)


@k8s.command()
@_name
@click.option("--follow", "-f", "follows", is_flag=True, help="Go on until the run has ended.")
def logs(name: str, follows: bool) -> None:
    """Print what a run has printed in its newest attempt; with --follow, to its end."""
    from pipeline.cluster.follow import Lines
    from pipeline.kubernetes.client import Kubernetes

    cluster = Kubernetes(NAMESPACE)
    newest = _newest(cluster, name)
    if follows:
        _follow(cluster, newest.name, as_json=False)
        return
    pod = cluster.submitter(newest.name)
    if pod is None:
        raise UsageError(f"{newest.name} has printed nothing yet: it is {newest.state.lower()}")
    lines = Lines(lambda line, _: click.echo(line), hides_result=True)
    for _, line in cluster.log(pod):
        lines.add(f"{line}\n")
    lines.end()


@k8s.command()
@_name
def stop(name: str) -> None:
    """Let a run save its state and end: its pods and its RayJob are deleted.

    Waits until they are gone. The same `submit` resumes it. Of a run that has ended, its RayJob and
    its log are deleted; the run's folder and its record stay.
    """
    from pipeline.kubernetes.client import Kubernetes
    from pipeline.kubernetes.submit import end

    cluster = Kubernetes(NAMESPACE)
    newest = _newest(cluster, name)
    began = time.monotonic()
    end(cluster, newest, cluster.platform().grace_seconds)
    took = time.monotonic() - began
    click.echo(f"run   {newest.name} is gone after {took:.0f} s")
    if not newest.is_over:
        click.echo("      the same `submit` resumes it", err=True)


@k8s.command()
def doctor() -> None:
    """Say what a cluster lacks to run jobs, and how to mend it.

    Ends with 1 where something is missing.
    """
    from pipeline.kubernetes.client import Kubernetes
    from pipeline.kubernetes.doctor import findings

    is_lacking = False
    for one in findings(Kubernetes(NAMESPACE)):
        is_lacking |= one.is_needed and not one.is_well
        for line in render.finding_lines(one):
            click.echo(line)
    sys.exit(int(is_lacking))


def _newest(cluster: Kubernetes, name: str) -> RunState:
    found = cluster.runs(name)
    if not found:
        raise UsageError(f"{name}: no run of that name is there")
    running = [one for one in found if not one.is_over]
    if len(running) > 1:
        names = ", ".join(one.name for one in running)
        raise UsageError(f"{name}: several run, name one of them: {names}")
    return (running or found)[0]
