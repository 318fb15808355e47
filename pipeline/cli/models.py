"""Commands that use a trained model: `evaluate`, `predict` and `export`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from pipeline import render
from pipeline.cli.group import cli
from pipeline.cli.jobs import show_live
from pipeline.errors import RecordError
from pipeline.redact import redact


@cli.command()
@click.argument("model")
@click.argument("files", nargs=-1, required=True)
@click.option("--report", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Write the pictures to this HTML file.")  # fmt: skip
@click.option("--no-record", is_flag=True, help="Do not tell MLflow.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on a line.")
def evaluate(
    model: str, files: tuple[str, ...], report: Path | None, no_record: bool, as_json: bool
) -> None:
    """Evaluate a trained model on files.

    MODEL is the folder of a finished run, its name in `runs`, its URI in an object store, or a
    model in MLflow, as models:/flights@champion. FILES are Parquet, Arrow or CSV files, folders,
    globs or URIs, with the columns that the job was trained on.

    Losses and metrics of all rows, as a run has them of its test rows. MLflow gets them as metrics
    of the model, with the digest of these rows, in a run below the one that trained it, with the
    pictures of the run page.
    """
    from pipeline.files.atomic import replacing
    from pipeline.launch.evaluate import evaluate as launch

    found = launch(model, files, record=not no_record, live=show_live)
    for line in render.evaluation_lines(found):
        click.echo(line, err=as_json)
    if report is not None:
        with replacing(report) as file:
            file.write(found.page.encode())
        click.echo(f"saved {report}", err=as_json)
    if found.unrecorded:
        click.echo(f"error: {redact(found.unrecorded)}", err=True)
    if as_json:
        click.echo(json.dumps(found.summary()))
    if found.unrecorded:
        sys.exit(RecordError.exit_code)


@cli.command()
@click.argument("model")
@click.argument("files", nargs=-1, required=True)
@click.option("--out", required=True, metavar="DIR", help="Folder for the predictions.")
@click.option(
    "--keep",
    multiple=True,
    metavar="COLUMN",
    help="A column to carry along; repeatable. Unless given, all that the model does not know.",
)
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1),
              help="Ray workers, which share the files.")  # fmt: skip
@click.option("--gpu", is_flag=True, help="Compute on one GPU per worker.")
@click.option("--fresh", is_flag=True, help="Replace predictions that are there already.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on a line.")
def predict(
    model: str,
    files: tuple[str, ...],
    out: str,
    keep: tuple[str, ...],
    workers: int,
    gpu: bool,
    fresh: bool,
    as_json: bool,
) -> None:
    """Predict files with a trained model.

    MODEL is the folder of a finished run, its name in `runs`, its URI in an object store, or a
    model in MLflow, as models:/flights@champion. FILES are Parquet, Arrow or CSV files, folders,
    globs or URIs.

    \b
    pipeline predict runs/flights-1 new/*.parquet --out predicted
    pipeline predict models:/flights@champion s3://bucket/day=7 --out predicted --workers 4

    For each file one Parquet file, with its rows in their order: ids and other columns that the
    model does not read, then the predictions. The bytes are the same for any number of workers. The
    same command again does the files that are left.
    """
    from pipeline.launch.predict import predict as launch

    made = launch(
        model, files, out, keep=keep or None, workers=workers, gpu=gpu, fresh=fresh, live=show_live
    )
    rate = made.num_rows / made.seconds if made.seconds else 0.0
    click.echo(
        f"done  {made.num_rows:,} rows predicted, {rate:,.0f} rows/s; {len(made.files)} "
        f"file{'s' if len(made.files) != 1 else ''} in {made.out}: {', '.join(made.columns)}",
        err=as_json,
    )
    if as_json:
        click.echo(json.dumps(made.summary()))


@cli.command()
@click.argument("model")
@click.argument("files", nargs=-1)
@click.option("--out", required=True, metavar="DIR", help="Folder for the programs.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on a line.")
def export(model: str, files: tuple[str, ...], out: str, as_json: bool) -> None:
    """Write a trained model as programs that need torch, or ONNX, alone.

    MODEL is the folder of a finished run, its name in `runs`, its URI in an object store, or a
    model in MLflow, as models:/flights@champion. FILES are rows to check the programs on; unless
    given, a few of the run's training rows.

    \b
    model.pt2           a program of torch.export: torch.export.load(...).module()
    model.onnx          the same for ONNX (needs onnx and onnxscript)
    model.safetensors   the weights, which model.init_from takes
    columns.json        what inputs and outputs mean, with the codes of categories

    Programs take numbers in the columns' own units and give what the model serves, to 1e-5.
    """
    from pipeline.launch.export import export as launch

    made = launch(model, out, files)
    for name in made.files:
        apart = made.distances.get(name)
        checked = "" if apart is None else f"  off by {apart:.1g} at most, on {made.num_rows} rows"
        click.echo(f"saved {made.out}/{name}{checked}", err=as_json)
    if "model.onnx" not in made.distances:
        click.echo("note  no model.onnx: pip install onnx onnxscript", err=True)
    if as_json:
        click.echo(json.dumps(made.summary()))
