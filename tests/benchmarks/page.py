"""Seconds until MLflow's page has drawn the charts of a long run, beside those of a short one.

100 000 steps of six losses, so eight metrics a step, and 100 steps of the same; recorded by a real
server, shown by a real Chromium. Also the seconds from the last step to the end of the command, and
the bytes of the record. In turns.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
from playwright.sync_api import Browser, sync_playwright

import pipeline
from pipeline.launch.result import Result as Run
from pipeline.rundir import RunDir
from pipeline.tracking import page
from tests import mlflow_server
from tests.benchmarks.harness import Result

ROUNDS = 3
STEPS = {"short": 100, "long": 100_000}
LOSSES = [
    {"name": "mse"}, {"name": "l1"},
    {"name": "huber"}, {"name": "huber", "delta": 3.0, "label": "huber 3"},
    {"name": "smooth_l1"}, {"name": "smooth_l1", "beta": 3.0, "label": "smooth_l1 3"},
]  # fmt: skip
CHARTS = 8
WAIT_MILLISECONDS = 120_000
DRAWN = ".js-plotly-plot .main-svg .trace"


def train(folder: Path, steps: int) -> tuple[Run, float]:
    """The run, and the seconds from its last step to its end."""
    rng = np.random.default_rng(0)
    rows = pd.DataFrame(rng.normal(size=(40, 5)), columns=[*"abcd", "y"])
    rows.to_csv(folder / "rows.csv", index=False)
    run = pipeline.run(
        {
            "name": f"page-{steps}", "model": "linear", "storage": str(folder / "runs"),
            "loss": LOSSES,
            "data": {"train": str(folder / "rows.csv"), "target": "y"},
            "training": {"epochs": steps // 2, "batch_size": 20},
        }
    )  # fmt: skip
    ended = time.time()
    last = next(point for point in reversed(run.curve) if "train" in point)
    return run, ended - last["time"] / 1000


def draw(browser: Browser, address: str) -> float:
    """Seconds until all charts of the first two sections are drawn."""
    tab = browser.new_page(viewport={"width": 1500, "height": 1800})
    started = time.perf_counter()
    tab.goto(address)
    tab.wait_for_function(
        f"document.querySelectorAll('{DRAWN}').length >= {CHARTS}", timeout=WAIT_MILLISECONDS
    )
    seconds = time.perf_counter() - started
    tab.close()
    return seconds


def results(rounds: int, quick: bool) -> Iterator[Result]:
    """Of each run."""
    steps = {"short": 20, "long": 100} if quick else STEPS
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        return
    with (
        tempfile.TemporaryDirectory() as place,
        mlflow_server.running(Path(place)) as server,
        patch.dict("os.environ", {"MLFLOW_TRACKING_URI": server.uri}),
        sync_playwright() as playwright,
    ):
        runs = {name: train(Path(place), number) for name, number in steps.items()}
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, (run, _) in runs.items():
                address = page.address(server.uri, run.experiment_id, run.run_id)
                charts = address.replace("?", "/model-metrics?")
                seconds[name].append(draw(browser, charts))
        browser.close()
        for name, (run, end) in runs.items():
            result: dict[str, Any] = {
                "case": name,
                "steps": run.steps,
                "charts": CHARTS,
                "seconds_until_drawn": median(seconds[name]),
                "slowest": max(seconds[name]),
                "seconds_from_last_step_to_end": end,
                "journal_bytes": RunDir(Path(run.storage)).journal.stat().st_size,
            }
            yield result
