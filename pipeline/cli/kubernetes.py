"""Commands for Kubernetes: `k8s render`, `submit`, `status`, `logs`, `stop` and `doctor`."""

from __future__ import annotations

import functools
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import click

from pipeline import render
from pipeline.cli.cluster import choose, confirm, line_printer
from pipeline.cli.group import cli
from pipeline.cli.jobs import job_options, parsed
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from pipeline.kubernetes.client import Kubernetes, RunState
    from pipeline.kubernetes.platform import Platform
    from pipeline.kubernetes.run import Run

Command = Callable[..., None]


@cli.group()
def k8s() -> None:
    """Train jobs on Kubernetes, with KubeRay; k8s/README.md tells how to set a cluster up."""


@dataclass(frozen=True)
class Request:
    """What a command line asks for: which job, and how it is to be tried."""

    job: str
    overrides: tuple[str, ...]
    imports: tuple[str, ...]
    timeout: str | None
    retries: int
    fresh: bool

    def prepare(self, platform: Platform) -> Run:
        """The run on a platform. Raises SpecError and UsageError."""
        from pipeline.kubernetes.render import prepare
        from pipeline.tracking.source import source_tags

        if self.timeout and not re.fullmatch(r"\d+(\.\d+)?[smh]", self.timeout):
            raise UsageError(f"--timeout {self.timeout}: expected a time, as 30s, 90m or 2h")
        # without what is not committed, which may be long
        source = {key: value for key, value in source_tags().items() if not key.endswith(".diff")}
        return prepare(
            self.job, self.overrides, parsed(self.overrides), self.imports, platform,
            timeout=self.timeout, retries=self.retries, fresh=self.fresh, source=source,
        )  # fmt: skip


def _run_options(command: Command) -> Command:
    """The options of a run; the command gets them as a `Request`."""

    @functools.wraps(command)
    def with_request(**options: Any) -> None:
        own = {field.name: options.pop(field.name) for field in fields(Request)}
        command(Request(**own), **options)

    collected: Command = with_request
    for add in (
        click.option(
            "--timeout",
            metavar="TIME",
            help="End an attempt after so long, as 12h or 90m; its state is saved. Unless given, "
            "training.time_limit, workers.wait and an hour more, or a day.",
        ),
        click.option(
            "--retries",
            type=click.IntRange(0),
            default=2,
            show_default=True,
            help="New Ray clusters after one that failed; each resumes. 0 with --fresh.",
        ),
        click.option(
            "--fresh", is_flag=True, help="Start a new run, whatever there is of this job."
        ),
    ):
        collected = add(collected)
    return job_options(collected)


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
def render_run(request: Request, as_json: bool, place: str) -> None:
    """Print the manifests that train a job: `kubectl apply --server-side -f -` starts it.

    Workers, GPUs, memory and deadlines are those of the spec; images, volumes and node labels those
    of the platform. The name follows from what is trained, so that the same job is not started
    twice. No cluster is asked.
    """
    from pipeline.kubernetes.platform import read
    from pipeline.kubernetes.render import checked, to_yaml

    run = request.prepare(read(place))
    documents = checked(run)
    for note in run.notes:
        click.echo(f"note  {note}", err=True)
    text = to_yaml(documents)
    if as_json:
        text = json.dumps({"apiVersion": "v1", "kind": "List", "items": documents}) + "\n"
    click.echo(text, nl=False)


@k8s.command()
@_run_options
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@click.option("--detach", is_flag=True, help="Do not follow it.")
def submit(request: Request, as_json: bool, yes: bool, detach: bool) -> None:
    """Train a job on Kubernetes, and follow it.

    The cluster is that of kubectl's context. What would happen is shown before it is asked for; the
    manifests are those of `render`, with the settings of the cluster's platform.

    The same command again attaches to the run while it is there, resumes it if it was stopped or
    has failed, and shows what became of one that is finished. Ctrl-C leaves it running. Exit codes
    are those of `run`.
    """
    from pipeline.cluster.plan import check_here
    from pipeline.kubernetes.client import Kubernetes
    from pipeline.kubernetes.render import checked
    from pipeline.kubernetes.submit import make_plan, send

    cluster = Kubernetes()
    platform = cluster.platform()
    run = request.prepare(platform)
    documents = checked(run)

    def check_job() -> list[str]:
        overrides = parsed(request.overrides)
        return check_here(request.job, overrides, request.imports, run.package)[0]

    plan = make_plan(cluster, run, check_job)
    for line in render.run_plan_lines(plan):
        click.echo(line, err=True)
    if plan.action in ("start", "resume"):
        confirm(yes)
        is_ours = send(plan, documents, platform.grace_seconds)
        what = "submitted" if is_ours else "was submitted by another command at the same time"
        click.echo(f"run   {run.name} {what}", err=True)
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
        state = {"state": "finished" if ended.succeeded else "failed"} if result is None else result
        click.echo(json.dumps({**state, "name": ended.name}))
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

    runs = Kubernetes().runs(name)
    if name and not runs:
        raise UsageError(f"{name}: no run of that name is there")
    lines = [json.dumps(one.to_json()) for one in runs] if as_json else render.run_lines(runs)
    for line in lines:
        click.echo(line)


@k8s.command()
@_name
@click.option("--follow", "-f", "follows", is_flag=True, help="Go on until the run has ended.")
def logs(name: str, follows: bool) -> None:
    """Print what a run has printed in its newest attempt; with --follow, to its end."""
    from pipeline.cluster.follow import Lines
    from pipeline.kubernetes.client import Kubernetes

    cluster = Kubernetes()
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

    cluster = Kubernetes()
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
    for one in findings(Kubernetes()):
        is_lacking |= one.is_needed and not one.is_well
        for line in render.finding_lines(one):
            click.echo(line)
    sys.exit(int(is_lacking))


def _newest(cluster: Kubernetes, name: str) -> RunState:
    runs = cluster.runs(name)
    if not runs:
        raise UsageError(f"{name}: no run of that name is there")
    return choose(name, {one.name: one for one in runs})
