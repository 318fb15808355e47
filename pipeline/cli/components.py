"""What a spec can say: `list` and `schema`."""

from __future__ import annotations

import json

import click

from pipeline import plugins, spec
from pipeline.cli.group import cli
from pipeline.registry import REGISTRIES


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
