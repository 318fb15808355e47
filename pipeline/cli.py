"""The commands. Each imports what it needs when it runs, so that `--help` answers at once."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click

from pipeline import plugins, render, spec
from pipeline.errors import PipelineError, RunError, StoppedError, UnrecordedError, UsageError
from pipeline.redact import redact
from pipeline.registry import REGISTRIES

STARTED = time.time()

Command = Callable[..., None]


def _job_options(command: Command) -> Command:
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


def _overrides(texts: tuple[str, ...]) -> dict[str, Any]:
    return dict(spec.parse_override(text) for text in texts)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="pipeline")
def cli() -> None:
    """Train what a job spec says: the same loss curve on any number of workers.

    \b
    pipeline check jobs/diabetes.yaml     what can be known before training
    pipeline run jobs/diabetes.yaml       train, and record the run in MLflow
    pipeline run jobs/diabetes.yaml --set workers.num=2
    pipeline prove jobs/diabetes.yaml     the same curve, however it is run?
    pipeline ui                           the recorded runs in the browser
    pipeline list losses                  what a spec can name
    pipeline schema > job.schema.json     for your editor's completion
    \b
    Exit codes: 0 done, 1 the run failed, 2 spec, data or command wrong,
    3 trained but not fully recorded, 130 stopped by Ctrl-C, 143 by SIGTERM,
    129 by a closed terminal.
    """


@cli.command()
@_job_options
@click.option("--fresh", is_flag=True, help="Start a new run, whatever there is of this job.")
def run(
    job: str, overrides: tuple[str, ...], imports: tuple[str, ...], as_json: bool, fresh: bool
) -> None:
    """Train a job and record it in MLflow.

    The same command again resumes a run that was stopped or killed, and prints the result of one
    that is finished.

    One worker runs in this process; with --set workers.num=N, N Ray workers train with DDP.
    Without MLFLOW_TRACKING_URI the record goes to a SQLite file beside the runs.
    """
    from pipeline.launch import run as launch
    from pipeline.launch.result import Result

    def finish(result: Result) -> None:
        if as_json:
            click.echo(json.dumps(result.summary()))

    try:
        result = launch.run(
            job,
            _overrides(overrides),
            imports,
            fresh=fresh,
            say=_say(as_json),
            live=_live,
            started=STARTED,
        )
    except UnrecordedError as error:
        click.echo(f"error: {redact(str(error))}", err=True)
        finish(error.result)
        sys.exit(error.exit_code)
    for line in render.result_lines(result):
        click.echo(line, err=as_json)
    finish(result)


def _say(as_json: bool) -> Callable[[str], None]:
    return lambda line: click.echo(line, err=as_json)


@cli.command()
@_job_options
def check(job: str, overrides: tuple[str, ...], imports: tuple[str, ...], as_json: bool) -> None:
    """Check a job without training it.

    Spec, files and columns; then one real batch through model and loss on the CPU.
    """
    from pipeline.launch import run as launch

    checked, prepared, notices = launch.check(job, _overrides(overrides), imports, live=_live)
    for line in render.check_lines(prepared, notices):
        click.echo(line, err=as_json)
    if as_json:
        facts = {
            "state": "ok",
            "name": checked.name,
            "digest": checked.digest,
            "rows": prepared.num_rows,
            "validation_rows": prepared.num_validation_rows,
            "notices": [str(notice) for notice in notices],
        }
        click.echo(json.dumps(facts))


@cli.command()
@_job_options
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
        _overrides(overrides),
        imports,
        steps=steps,
        workers=counts,
        tolerance=tolerance,
        each=each,
        say=_live,
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


def _live(text: str) -> None:
    """A line that the next one replaces, where somebody watches."""
    if sys.stderr.isatty():
        click.echo(f"{text}\r", err=True, nl=False)


@cli.command("list")
@click.argument("kind", type=click.Choice(list(REGISTRIES)))
@click.option("--import", "imports", multiple=True, metavar="MODULE", help="As for `run`.")
def list_(kind: str, imports: tuple[str, ...]) -> None:
    """Print what a spec can name: losses, models, optimizers, schedules or metrics."""
    plugins.load(imports)
    for name, entry in sorted(REGISTRIES[kind].entries.items()):
        click.echo(f"{click.style(name, bold=True)}  {entry.doc}")
        options = entry.options.model_fields if kind != "metrics" else {}  # a spec gives them none
        for option, field in options.items():
            default = "required" if field.is_required() else json.dumps(field.default)
            click.echo(f"    {option}: {default}")


@cli.command()
@click.option("--import", "imports", multiple=True, metavar="MODULE", help="As for `run`.")
@click.option("--markdown", is_flag=True, help="Print a table of all keys, to be read.")
def schema(imports: tuple[str, ...], markdown: bool) -> None:
    """Print the JSON schema of job specs, for completion in editors."""
    from pipeline.spec import reference

    plugins.load(imports)
    click.echo(reference.table() if markdown else json.dumps(spec.schema(), indent=2))


@cli.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
def sync(folder: str) -> None:
    """Finish the MLflow record of a run's folder, after the server was down."""
    from pipeline.launch.signals import collect_signals
    from pipeline.tracking import process

    with collect_signals() as signals:
        recorded = process.finish(folder, signals)
    click.echo(f"mlflow run {recorded.run_id} in {recorded.tracking_uri} has the whole record")


@cli.command()
@click.argument("folder", type=click.Path(file_okay=False), default="runs")
@click.option("--port", default=5000, show_default=True, help="Port of the server on this machine.")
@click.option("--no-browser", is_flag=True, help="Only print the address.")
def ui(folder: str, port: int, no_browser: bool) -> None:
    """Open MLflow's page on a run's folder, or on all runs of a storage.

    Where MLFLOW_TRACKING_URI, or the run's record, names a server, it is that server's page; else
    one is started over the SQLite file beside the runs, until Ctrl-C.
    """
    from pipeline.launch.signals import signals_raise
    from pipeline.rundir import RunDir
    from pipeline.tracking import page
    from pipeline.tracking.names import tracking_uri, with_password

    run = RunDir(Path(folder).resolve())
    recorded = run.read_recorded()
    uri = recorded.tracking_uri or tracking_uri(run.path)
    ids = recorded.experiment_id, recorded.run_id

    def show(server: str) -> None:
        address = page.address(server, *ids)
        click.echo(address)
        if not no_browser:
            click.launch(address)

    if uri.startswith("http"):
        show(redact(uri))
        return
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise UsageError(f"{folder}: no run was recorded here ({uri})")
    try:
        with signals_raise(), page.serving(with_password(uri), port) as server:
            show(server)
            click.echo("Ctrl-C ends the server", err=True)
            signal.pause()
    except StoppedError as error:
        raise StoppedError(error.number, "") from None


@cli.group()
def cache() -> None:
    """Rows that were converted for training, kept on this machine.

    In PIPELINE_CACHE, or ~/.cache/pipeline, unless a job's cache.folder says otherwise.
    """


_folder_option = click.option("--folder", metavar="FOLDER", help="A job's own cache.folder.")


@cache.command("list")
@_folder_option
def list_cache(folder: str | None) -> None:
    """Print what is kept, the data set used last first."""
    from pipeline.data import cache as rows

    root = rows.make_folder(spec.Cache(folder=folder))
    for line in render.cache_lines(rows.entries(root), root):
        click.echo(line)


@cache.command("clear")
@_folder_option
@click.argument("names", nargs=-1, metavar="[NAME]...")
def clear_cache(names: tuple[str, ...], folder: str | None) -> None:
    """Delete what is kept: all, or the named ones (as `list` prints them).

    Running jobs keep their rows until they end; later ones convert them again.
    """
    from pipeline.data import cache as rows

    root = rows.make_folder(spec.Cache(folder=folder))
    known = [entry.name for entry in rows.entries(root)]
    for name in names:
        if not any(entry.startswith(name) for entry in known):
            raise UsageError(f"{name}: no such data set in {root}")
    chosen = [entry for entry in known if not names or entry.startswith(names)]
    click.echo(f"{len(chosen)} deleted, {render.size_text(rows.clear(root, chosen))}")


def main() -> None:
    """Run a command; a known error is one message and its exit code, not a traceback."""
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        _end(StoppedError(signal.SIGINT, ""))
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except PipelineError as error:
        _end(error)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        path = error.filename2 or error.filename
        _end(RunError(f"{path}: {error.strerror}" if path else str(error)))


def _end(error: PipelineError) -> NoReturn:
    """Say what went wrong, and end with its exit code."""
    from pipeline.launch.signals import is_left_behind, let_go_of_output

    text = redact("\n  ".join([str(error), *getattr(error, "__notes__", [])]))
    try:
        click.echo(text if isinstance(error, StoppedError) else f"error: {text}", err=True)
        if "--json" in sys.argv:
            state = "stopped" if isinstance(error, StoppedError) else "failed"
            click.echo(json.dumps({"state": state, "error": text, **error.run}))
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # nobody reads it any more: Python would end with a code of its own
        let_go_of_output()
    if is_left_behind():
        os._exit(error.exit_code)
    sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
