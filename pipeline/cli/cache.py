"""`pipeline cache`: converted rows that are kept."""

from __future__ import annotations

import click

from pipeline import render, spec
from pipeline.cli.group import cli
from pipeline.errors import UsageError


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
