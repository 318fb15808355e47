"""`python -m tests.benchmarks NAME`: run one benchmark, or list them."""

from __future__ import annotations

import importlib
import json
import pkgutil

import click

from tests import benchmarks
from tests.benchmarks.harness import shorten

NAMES = sorted(
    found.name
    for found in pkgutil.iter_modules(benchmarks.__path__)
    if found.name not in ("__main__", "harness")
)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("name", required=False, type=click.Choice(NAMES))
@click.option(
    "--quick", is_flag=True, help="As little as shows that it works; no figures to quote."
)
@click.option("--rounds", type=click.IntRange(1), help="How often contestants take turns.")
def main(name: str | None, quick: bool, rounds: int | None) -> None:
    """Measure again what the documents say; without NAME, list what there is.

    Each result is one line of JSON. Figures of one machine are to be compared with each other only.
    """
    if name is None:
        for each in NAMES:
            text = importlib.import_module(f"tests.benchmarks.{each}").__doc__ or ""
            click.echo(f"{each:12} {text.partition(chr(10))[0]}")
        return
    module = importlib.import_module(f"tests.benchmarks.{name}")
    for result in module.results(rounds=1 if quick else rounds or module.ROUNDS, quick=quick):
        click.echo(json.dumps({"benchmark": name, **shorten(result)}))


if __name__ == "__main__":
    main()
