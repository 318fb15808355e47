"""Commands that take a job spec: `run`, `check` and `prove`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from pipeline import render, spec
from pipeline.cli.group import cli
from pipeline.errors import RecordError, UnrecordedError, UsageError
from pipeline.redact import redact

STARTED = time.time()

Command = Callable[..., None]


def job_options(command: Command) -> Command:
    """The argument and options of commands that take a job spec."""
    for add in (
        click.option("--json", "as_json", is_flag=True, help="End with one JSON object on a line."),
        click.option(
            "--import",
            "imports",
            multiple=True,
            metavar="MODULE",
            help="Module or .py file with custom losses, models, metrics, optimizers; repeatable.",
        ),
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY.PATH=VALUE",
            help="Override one value of the spec, as in --set training.epochs=3; repeatable.",
        ),
        click.argument("job", metavar="JOB.yaml"),
    ):
        command = add(command)
    return command


def parsed(texts: tuple[str, ...]) -> dict[str, Any]:
    """What `--set` says, by key path."""
    return dict(spec.parse_override(text) for text in texts)


@cli.command()
@job_options
@click.option("--fresh", is_flag=True, help="Start a new run, whatever there is of this job.")
@click.option("--folds", type=click.IntRange(2), metavar="N",
              help="Train N times, each with another Nth of the rows for validation.")  # fmt: skip
def run(
    job: str,
    overrides: tuple[str, ...],
    imports: tuple[str, ...],
    as_json: bool,
    fresh: bool,
    folds: int | None,
) -> None:
    """Train a job and record it in MLflow.

    The same command again resumes a run that was stopped or killed, and prints the result of one
    that is finished.

    One worker runs in this process; with --set workers.num=N, N Ray workers train with DDP.
    Without MLFLOW_TRACKING_URI the record goes to a SQLite file beside the runs.
    """
    from pipeline.launch import run as launch
    from pipeline.launch.result import Result

    if folds is not None:
        _run_folds(job, folds, parsed(overrides), imports, as_json, fresh)
        return

    def finish(result: Result) -> None:
        if as_json:
            click.echo(json.dumps(result.summary()))

    try:
        result = launch.run(
            job,
            parsed(overrides),
            imports,
            fresh=fresh,
            say=_say(as_json),
            live=show_live,
            started=STARTED,
        )
    except UnrecordedError as error:
        click.echo(f"error: {redact(str(error))}", err=True)
        finish(error.result)
        sys.exit(error.exit_code)
    for line in render.result_lines(result):
        click.echo(line, err=as_json)
    finish(result)


def _run_folds(
    job: str,
    num: int,
    overrides: dict[str, Any],
    imports: tuple[str, ...],
    as_json: bool,
    fresh: bool,
) -> None:
    from pipeline.launch.folds import run_folds

    found = run_folds(
        job, num, overrides, imports,
        fresh=fresh, say=_say(as_json), live=show_live, started=STARTED,
    )  # fmt: skip
    for line in render.folds_lines(found):
        click.echo(line, err=as_json)
    if found.unrecorded:
        click.echo(f"error: {redact(found.unrecorded)}; the same command records it", err=True)
    if as_json:
        click.echo(json.dumps(found.summary()))
    if found.unrecorded:
        sys.exit(RecordError.exit_code)


def _say(as_json: bool) -> Callable[[str], None]:
    return lambda line: click.echo(line, err=as_json)


@cli.command()
@job_options
def check(job: str, overrides: tuple[str, ...], imports: tuple[str, ...], as_json: bool) -> None:
    """Check a job without training it.

    Spec, files and columns; then one real batch through model and loss on the CPU.
    """
    from pipeline.launch import run as launch

    checked, prepared, notices = launch.check(job, parsed(overrides), imports, live=show_live)
    for line in render.check_lines(prepared, notices):
        click.echo(line, err=as_json)
    if as_json:
        facts = {
            "state": "ok",
            "name": checked.name,
            "digest": checked.digest,
            "rows": prepared.num_rows,
            "validation_rows": prepared.num_validation_rows,
            "test_rows": prepared.num_test_rows,
            "notices": [str(notice) for notice in notices],
        }
        click.echo(json.dumps(facts))


@cli.command()
@job_options
@click.option(
    "--steps",
    default=50,
    show_default=True,
    type=click.IntRange(1),
    help="How many of the job's first steps to run each time.",
)
@click.option(
    "--workers",
    default="1,2,3,4",
    show_default=True,
    metavar="N,N,...",
    help="Numbers of workers to compare.",
)
@click.option(
    "--tolerance",
    default=1e-5,
    show_default=True,
    type=click.FloatRange(0),
    help="Largest relative difference where only rounding may differ.",
)
@click.option("--track", is_flag=True, help="Record table and verdict in MLflow.")
def prove(
    job: str,
    overrides: tuple[str, ...],
    imports: tuple[str, ...],
    as_json: bool,
    steps: int,
    workers: str,
    tolerance: float,
    track: bool,
) -> None:
    """Show that a job's curve does not depend on how it is run, here and now.

    Its first steps on several numbers of workers, with workers killed and replaced by fewer and by
    more, must give the same bits; other cuts into micro-batches the same curve to rounding. Ends
    with exit code 1 when that breaks, and names the component that breaks it.
    """
    from pipeline.verify import prove as proving

    try:
        counts = [int(part) for part in workers.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise UsageError(f"--workers {workers}: expected numbers such as 1,2,3")
    say = _say(as_json)
    header = iter([render.PROOF_HEADER])

    def each(outcome: proving.Outcome) -> None:
        for line in (*header, render.proof_row(outcome)):  # no header over an error
            say(line)

    proof = proving.prove(
        job,
        parsed(overrides),
        imports,
        steps=steps,
        workers=counts,
        tolerance=tolerance,
        each=each,
        say=show_live,
    )
    conclusion = render.proof_conclusion(proof)
    for line in conclusion:
        say(line)
    summary = proof.summary()
    if track:
        from pipeline.tracking.client import log_proof

        text = "\n".join([*map(render.proof_row, proof.outcomes), *conclusion])
        storage = Path(proof.storage).parent
        summary["run_id"], uri = log_proof(
            summary, proof.tags, text, proof.name, proof.experiment, storage
        )
        say(f"mlflow run {summary['run_id']} in {uri}")
    if as_json:
        click.echo(json.dumps(summary))
    sys.exit(0 if proof.is_kept else 1)


def show_live(text: str) -> None:
    """A line that the next one replaces, where somebody watches."""
    if sys.stderr.isatty():
        click.echo(f"{text}\r", err=True, nl=False)
