"""The command `pipeline` itself: its help, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import NoReturn

import click

from pipeline.errors import PipelineError, RunError, StoppedError
from pipeline.redact import redact


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="pipeline")
def cli() -> None:
    """Train what a job spec says: the same loss curve on any number of workers.

    \b
    pipeline check jobs/diabetes.yaml     what can be known before training
    pipeline run jobs/diabetes.yaml       train, and record the run in MLflow
    pipeline run jobs/diabetes.yaml --set workers.num=2
    pipeline run jobs/diabetes.yaml --folds 5
    pipeline submit jobs/diabetes.yaml    the same on a Ray cluster; also status, logs, stop
    pipeline k8s submit jobs/diabetes.yaml    the same on Kubernetes
    pipeline prove jobs/diabetes.yaml     the same curve, however it is run?
    pipeline runs                         the runs there are, and how good
    pipeline compare runs/a-1 runs/a-2    what differs, and from which step
    pipeline report runs/diabetes-1       its pictures, as one file
    pipeline evaluate runs/diabetes-1 test.parquet
    pipeline predict runs/diabetes-1 new/*.csv --out predicted
    pipeline export runs/diabetes-1 --out exported
    pipeline ui                           the recorded runs in the browser
    pipeline list losses                  what a spec can name
    pipeline schema > job.schema.json     for your editor's completion
    \b
    Exit codes: 0 done, 1 the run failed, 2 spec, data or command wrong,
    3 trained but not fully recorded, 130 stopped by Ctrl-C, 143 by SIGTERM,
    129 by a closed terminal.
    """


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
