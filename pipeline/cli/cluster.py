"""Commands for jobs on a Ray cluster: `submit`, `status`, `logs` and `stop`."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Protocol, TypeVar

import click

from pipeline import render
from pipeline.cli.group import cli
from pipeline.cli.jobs import job_options, parsed
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from pipeline.cluster.client import Cluster, Submission
    from pipeline.cluster.follow import Lines
    from pipeline.cluster.plan import Plan

PLAIN_SECONDS = 10.0
"""Between lines of progress where nobody watches."""
MOST_LOGS = 5
"""Logs that `status` reads."""
WAIT_SECONDS = 180.0
"""For a job that was asked to stop."""

Command = Callable[..., None]


class _Attempt(Protocol):
    @property
    def is_over(self) -> bool: ...


Attempt = TypeVar("Attempt", bound=_Attempt)


def _address(command: Command) -> Command:
    return click.option(
        "--address",
        envvar="RAY_API_SERVER_ADDRESS",
        default="http://127.0.0.1:8265",
        show_default=True,
        metavar="URL",
        help="The cluster's dashboard; or RAY_API_SERVER_ADDRESS. RAY_AUTH_TOKEN holds its token.",
    )(command)


def _name(command: Command) -> Command:
    return click.argument("name", metavar="JOB")(command)


@cli.command()
@job_options
@_address
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@click.option("--detach", is_flag=True, help="Do not follow it.")
@click.option("--fresh", is_flag=True, help="Start a new run, whatever there is of this job.")
def submit(
    job: str,
    overrides: tuple[str, ...],
    imports: tuple[str, ...],
    as_json: bool,
    address: str,
    yes: bool,
    detach: bool,
    fresh: bool,
) -> None:
    """Train a job on a Ray cluster, and follow it.

    The job is checked here, and what would happen is shown before it is asked for. Sent are the
    job's file, custom modules, and local files that it names by relative paths; what it names by
    absolute path or URI, the cluster reads by itself.

    The same command again attaches to the job while it runs, resumes it if it was stopped or has
    failed, and tells the result of one that is finished. Ctrl-C leaves it running. Exit codes are
    those of `run`.
    """
    from pipeline.cluster.client import Cluster
    from pipeline.cluster.plan import make_plan

    cluster = Cluster(address)
    plan = make_plan(cluster, job, overrides, parsed(overrides), imports, fresh)
    for line in render.plan_lines(plan):
        click.echo(line, err=True)
    if plan.action in ("start", "resume"):
        confirm(yes)
        _send(plan)
    if detach:
        _tell_next(plan.spec.name, cluster.address, plan.id)
        if as_json:
            click.echo(json.dumps({"state": "submitted", "submission_id": plan.id}))
        return
    _follow(cluster, cluster.submission(plan.id), as_json)


def confirm(yes: bool) -> None:
    """Ask whether to submit; ends the command with 0 for a no. Raises UsageError without a tty."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError("nobody is here to be asked: --yes submits it")
    if not click.confirm("submit it?", default=True, err=True):
        raise click.exceptions.Exit(0)


def _send(plan: Plan) -> None:
    from pipeline.tracking.source import source_tags

    with TemporaryDirectory() as name:
        plan.package.write(Path(name), source_tags())
        try:
            is_new = plan.cluster.submit(
                plan.id, plan.command, Path(name), plan.variables, plan.metadata
            )
        except KeyboardInterrupt:
            click.echo("\nit may be submitted all the same: the same command attaches", err=True)
            raise
    said = "submitted" if is_new else "was submitted by another command at the same time"
    click.echo(f"job   {plan.id} {said}", err=True)


def _follow(cluster: Cluster, submission: Submission, as_json: bool) -> None:
    """Show a job to its end, and end with its exit code; Ctrl-C leaves it."""
    from pipeline.cluster.follow import Lines, exit_code, explain, follow

    lines = Lines(line_printer(submission.is_over), hides_result=True)
    try:
        ended = follow(cluster, submission.id, lines)
    except KeyboardInterrupt:
        click.echo("\ndetached: the job goes on", err=True)
        _tell_next(submission.job, cluster.address, submission.id)
        if as_json:
            click.echo(json.dumps({"state": "detached", "submission_id": submission.id}))
        return
    _finish(ended, lines, as_json, explain(ended, lines))
    sys.exit(exit_code(ended))


def line_printer(is_over: bool) -> Callable[[str, bool], None]:
    """Prints a job's lines; those of progress replace each other, or come now and then.

    Of a job that is over, there is none of them.
    """
    is_live, shown = sys.stderr.isatty(), -math.inf

    def show(line: str, is_passing: bool) -> None:
        nonlocal shown
        if is_passing and (is_over or time.monotonic() - shown < PLAIN_SECONDS):
            return
        if is_live:
            click.echo(f"\x1b[2K{line}{chr(13) if is_passing else chr(10)}", nl=False, err=True)
            return
        shown = time.monotonic() if is_passing else shown
        click.echo(line, err=True)

    return show


def _finish(ended: Submission, lines: Lines, as_json: bool, why: str) -> None:
    if why:
        click.echo(f"error: {ended.id}: {why}", err=True)
    if ended.status == "STOPPED":
        click.echo(f"job   {ended.id} was stopped; the same command resumes it", err=True)
    if as_json:
        state = {"state": ended.status.lower()} if lines.result is None else lines.result
        click.echo(json.dumps({**state, "submission_id": ended.id}))


def _tell_next(name: str, address: str, submission_id: str) -> None:
    at = f" --address {address}"
    for command, what in (
        (f"pipeline logs {name} --follow{at}", "follow it"),
        (f"pipeline status {name}{at}", "what it is at"),
        (f"pipeline stop {name}{at}", "save its state and end it"),
    ):
        click.echo(f"      {command:60}  {what}", err=True)
    click.echo(f"see   {address}/#/jobs/{submission_id}", err=True)


@cli.command()
@click.argument("name", metavar="[JOB]", required=False)
@_address
@click.option("--json", "as_json", is_flag=True, help="A JSON object a line for each submission.")
def status(name: str | None, address: str, as_json: bool) -> None:
    """Show what was submitted to a Ray cluster, and what the newest say: all jobs, or one.

    JOB is a job's name, or the id of a submission.
    """
    from pipeline.cluster.client import Cluster
    from pipeline.cluster.follow import last_words

    cluster = Cluster(address)
    found = cluster.submissions(name)
    if name and not found:
        raise UsageError(f"{name}: nothing of that name was submitted there")
    if as_json:
        for one in found:
            click.echo(json.dumps(one.to_json()))
        return
    said = {}
    for one in found[:MOST_LOGS]:
        with contextlib.suppress(UsageError):  # a log that is gone says nothing
            said[one.id] = last_words(cluster.logs(one.id), one.is_over)
    for line in render.submission_lines(found, said):
        click.echo(line)


@cli.command()
@_name
@_address
@click.option("--follow", "-f", "follows", is_flag=True, help="Go on until the job has ended.")
def logs(name: str, address: str, follows: bool) -> None:
    """Print what a job on a Ray cluster has printed; with --follow, to its end.

    JOB is a job's name, whose submission that runs is meant, or else the newest; or the id of one.
    """
    from pipeline.cluster.client import Cluster
    from pipeline.cluster.follow import Lines

    cluster = Cluster(address)
    newest = _newest(cluster, name)
    if follows:
        _follow(cluster, newest, as_json=False)
        return
    lines = Lines(lambda line, _: click.echo(line), hides_result=True)
    lines.add(cluster.logs(newest.id))
    lines.end()


@cli.command()
@_name
@_address
def stop(name: str, address: str) -> None:
    """Let a job on a Ray cluster save its state and end.

    Waits until it has ended. The same `submit` resumes it.
    """
    from pipeline.cluster.client import Cluster

    cluster = Cluster(address)
    newest = _newest(cluster, name)
    if newest.is_over:
        click.echo(f"job   {newest.id} has ended already: {newest.status.lower()}")
        return
    cluster.stop(newest.id)
    deadline = time.monotonic() + WAIT_SECONDS
    while not (newest := cluster.submission(newest.id)).is_over:
        if time.monotonic() > deadline:
            raise UsageError(f"{newest.id} has not ended within {WAIT_SECONDS:.0f} s; ask again")
        time.sleep(0.5)
    resumes = "; `submit` resumes it" if newest.status == "STOPPED" else ""
    click.echo(f"job   {newest.id} has ended: {newest.status.lower()}{resumes}")


def _newest(cluster: Cluster, name: str) -> Submission:
    submissions = cluster.submissions(name)
    if not submissions:
        raise UsageError(f"{name}: nothing of that name was submitted to {cluster.address}")
    return choose(name, {one.id: one for one in submissions})


def choose(name: str, attempts: Mapping[str, Attempt]) -> Attempt:
    """The attempt at a job that runs, or else the newest, which is the first; by their ids.

    Raises UsageError where several run.
    """
    running = [each for each, one in attempts.items() if not one.is_over]
    if len(running) > 1:
        raise UsageError(f"{name}: several run, name one of them: {', '.join(running)}")
    return attempts[running[0]] if running else next(iter(attempts.values()))
