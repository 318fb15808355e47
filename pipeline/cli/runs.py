"""Commands on runs that there are: `runs`, `compare`, `report`, `ui` and `sync`."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline import render
from pipeline.cli.group import cli
from pipeline.errors import StoppedError, UsageError
from pipeline.redact import redact

if TYPE_CHECKING:
    from pipeline.rundir import RunDir
    from pipeline.rundir.summary import Summary


@cli.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
def sync(folder: str) -> None:
    """Finish the MLflow record of a run's folder, after the server was down."""
    from pipeline.launch.signals import collect_signals
    from pipeline.tracking import process

    with collect_signals() as signals:
        recorded = process.finish(folder, signals)
    click.echo(f"mlflow run {recorded.run_id} in {recorded.tracking_uri} has the whole record")


class RunFolder(click.ParamType):  # type: ignore[type-arg]  # takes none in click 8.1
    """A run's folder, the name of one in the storage `runs`, as `pipeline runs` lists them, or its
    URI in an object store."""

    name = "folder"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The folder's path."""
        from pipeline.launch.trained import folder_of

        try:
            folder = folder_of(str(value), Path("runs"))
        except UsageError as error:
            raise UsageError(f"{redact(str(value))} {error}") from None
        return folder or Path(value)  # which the command refuses


FOLDERS = click.argument("folders", nargs=-1, metavar="[FOLDER]...", type=RunFolder())


@cli.command()
@FOLDERS
@click.option("--port", default=5000, show_default=True, help="Port of the server on this machine.")
@click.option("--no-browser", is_flag=True, help="Only print the address.")
def ui(folders: tuple[Path, ...], port: int, no_browser: bool) -> None:
    """Open MLflow's page on a run, on several, or on a storage.

    Several runs are shown side by side. Without a folder, the storage `runs`. Where
    MLFLOW_TRACKING_URI, or the run's record, names a server, it is that server's page; else one is
    started over the SQLite file beside the runs, until Ctrl-C.
    """
    from pipeline.launch.signals import signals_raise
    from pipeline.rundir import RunDir
    from pipeline.tracking import page
    from pipeline.tracking.names import tracking_uri, with_password

    runs = [RunDir(folder.resolve()) for folder in folders or (Path("runs"),)]
    recorded = [run.read_recorded() for run in runs]
    uri = recorded[0].tracking_uri or tracking_uri(runs[0].path)
    if odd := [run for run, one in zip(runs, recorded, strict=True) if len(runs) > 1
               and (one.tracking_uri != uri or not one.run_id)]:  # fmt: skip
        raise UsageError(f"{odd[0].path}: not recorded in {redact(uri)}, as {runs[0].path} is")

    def show(server: str) -> None:
        experiments, ids = ([one.experiment_id for one in recorded], [r.run_id for r in recorded])
        if len(runs) > 1:
            address = page.comparison(server, experiments, ids)
        else:
            address = page.address(server, experiments[0], ids[0])
        click.echo(address)
        if not no_browser:
            _open(address)

    if uri.startswith("http"):
        show(redact(uri))
        return
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise UsageError(f"{runs[0].path}: no run was recorded here ({uri})")
    try:
        with signals_raise(), page.serving(with_password(uri), port) as server:
            show(server)
            click.echo("Ctrl-C ends the server", err=True)
            signal.pause()
    except StoppedError as error:
        raise StoppedError(error.number, "") from None


@cli.command()
@click.argument("storage", default="runs", type=click.Path(file_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="A JSON object a line for each run.")
def runs(storage: Path, as_json: bool) -> None:
    """List the runs in a storage, the newest first.

    With the metric that runs of the job are compared by, beside what a constant prediction has.
    """
    from pipeline.rundir.summary import summaries

    if not storage.is_dir():
        raise UsageError(f"{storage}: no such folder; a job's `storage` holds its runs")
    listed = list(summaries(storage.resolve()))
    if as_json:
        for one in listed:
            click.echo(json.dumps(one.to_json()))
        return
    if not listed:
        click.echo(f"no runs in {storage}", err=True)
        return
    for line in render.runs_lines(listed):
        click.echo(line)


@cli.command()
@FOLDERS
def compare(folders: tuple[Path, ...]) -> None:
    """Compare runs: spec, metrics, and where their curves part.

    The first run is the one that the others are compared with.
    """
    from pipeline.report.compare import compare as compared

    if len(folders) < 2:
        raise UsageError("compare: give the folders of two runs or more")
    comparison = compared([_summary(folder) for folder in folders])
    for line in render.comparison_lines(comparison):
        click.echo(line)
    click.echo(f"see  pipeline ui {' '.join(map(str, folders))}")


@cli.command()
@click.argument("folder", type=RunFolder())
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
    help="The file to write; report.html in the run's folder unless given.",
)  # fmt: skip
@click.option("--open", "is_opened", is_flag=True, help="Show it in the browser.")
def report(folder: Path, output: Path | None, is_opened: bool) -> None:
    """Write a run's pictures and tables as one HTML file.

    It needs nothing else, and can be mailed. Of what the folder holds by now, whether the run is
    finished or not; no server is asked.
    """
    from pipeline.files.atomic import replacing
    from pipeline.report.build import build
    from pipeline.report.curves import Curves
    from pipeline.report.facts import facts
    from pipeline.report.page import html
    from pipeline.rundir.journal import Reader

    run = _run(folder)
    curves = Curves().add(Reader(run.journal).new())
    text = html(run.name, facts(run, curves), build(run, curves))
    path = output or run.path / "report.html"
    with replacing(path) as file:
        file.write(text.encode())
    click.echo(path)
    if is_opened:
        _open(path.resolve().as_uri())


def _open(address: str) -> None:
    """Show it in the browser, if there is one."""
    import webbrowser

    webbrowser.open(address)


def _summary(folder: Path) -> Summary:
    """What a run's folder says of it. Raises UsageError for one that is none."""
    from pipeline.rundir.summary import summary

    one = summary(_run(folder))
    if one is None:
        raise UsageError(f"{folder}: record.json is damaged")
    return one


def _run(folder: Path) -> RunDir:
    """A run's folder. Raises UsageError for one that is none."""
    from pipeline.rundir import RunDir

    run = RunDir(folder.resolve())
    if not run.record.exists():
        raise UsageError(f"{folder}: not the folder of a run (no record.json)")
    return run
